"""``megachiar chat`` from a checkout."""

from megachiar.cli.chat import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
