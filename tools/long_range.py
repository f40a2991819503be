"""``megachiar long-range`` from a checkout."""

from megachiar.cli.long_range import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
