"""``megachiar demo`` from a checkout."""

from megachiar.cli.demo import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
