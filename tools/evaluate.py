"""``megachiar evaluate`` from a checkout."""

from megachiar.cli.evaluate import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
