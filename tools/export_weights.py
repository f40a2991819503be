"""``megachiar export`` from a checkout."""

from megachiar.cli.export import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
