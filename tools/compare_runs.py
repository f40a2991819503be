"""``megachiar compare`` from a checkout."""

from megachiar.cli.compare import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
