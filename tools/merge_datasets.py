"""``megachiar merge`` from a checkout."""

from megachiar.cli.merge import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
