"""``megachiar generate`` from a checkout."""

from megachiar.cli.generate import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
