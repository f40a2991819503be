"""``megachiar routes`` from a checkout."""

from megachiar.cli.routes import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
