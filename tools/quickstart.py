"""``megachiar quickstart`` from a checkout."""

from megachiar.cli.quickstart import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
