"""``megachiar bench-layers`` from a checkout."""

from megachiar.cli.bench_layers import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
