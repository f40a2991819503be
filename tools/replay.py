"""``megachiar replay`` from a checkout."""

from megachiar.cli.replay import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
