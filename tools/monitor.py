"""``megachiar monitor`` from a checkout."""

from megachiar.cli.monitor import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
