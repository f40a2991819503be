"""``megachiar page`` from a checkout."""

from megachiar.cli.page import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
