"""``megachiar import`` from a checkout."""

from megachiar.cli.import_ import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
