"""``megachiar bench-decode`` from a checkout."""

from megachiar.cli.bench_decode import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
