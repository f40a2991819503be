"""``megachiar bigram`` from a checkout."""

from megachiar.cli.bigram import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
