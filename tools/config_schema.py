"""``megachiar config schema`` from a checkout: python tools/config_schema.py > configs/schema.json"""

from megachiar.cli.config import main
from megachiar.console import run

if __name__ == "__main__":
    run(lambda: main(["schema"]))
