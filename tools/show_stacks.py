"""``megachiar stacks`` from a checkout."""

from megachiar.cli.stacks import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
