"""``megachiar bench-checkpoint`` from a checkout."""

from megachiar.cli.bench_checkpoint import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
