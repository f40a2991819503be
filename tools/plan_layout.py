"""``megachiar plan`` from a checkout."""

from megachiar.cli.plan import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
