"""``megachiar report`` from a checkout."""

from megachiar.cli.report import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
