"""``megachiar analyze-routing`` from a checkout."""

from megachiar.cli.analyze_routing import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
