"""``megachiar bench-device`` from a checkout."""

from megachiar.cli.bench_device import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
