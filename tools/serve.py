"""``megachiar serve`` from a checkout."""

from megachiar.cli.serve import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
