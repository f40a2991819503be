"""``megachiar bench-dropout`` from a checkout."""

from megachiar.cli.bench_dropout import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
