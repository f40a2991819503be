"""``megachiar inspect`` from a checkout."""

from megachiar.cli.inspect import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
