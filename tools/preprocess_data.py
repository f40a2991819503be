"""``megachiar preprocess`` from a checkout."""

from megachiar.cli.preprocess import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
