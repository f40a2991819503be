"""``megachiar sweep`` from a checkout."""

from megachiar.cli.sweep import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
