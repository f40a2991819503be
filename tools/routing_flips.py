"""``megachiar flips`` from a checkout."""

from megachiar.cli.flips import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
