"""``megachiar tokenizer`` from a checkout."""

from megachiar.cli.tokenizer import main
from megachiar.console import run

if __name__ == "__main__":
    run(main)
