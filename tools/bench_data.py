"""``megachiar bench-data`` from a checkout."""

from megachiar.cli.bench_data import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
