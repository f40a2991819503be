"""``megachiar bench-train`` from a checkout."""

from megachiar.cli.bench_train import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
