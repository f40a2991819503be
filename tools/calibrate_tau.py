"""``megachiar calibrate`` from a checkout."""

from megachiar.cli.calibrate import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
