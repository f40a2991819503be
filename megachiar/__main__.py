"""``python -m megachiar COMMAND`` is the same as ``megachiar COMMAND``."""

from megachiar.cli.main import start

if __name__ == "__main__":
    start()
