"""``megachiar corpus`` from a checkout."""

from megachiar.cli.corpus import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
