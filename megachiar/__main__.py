"""``python -m megachiar COMMAND``: what the console command ``megachiar`` does."""

from megachiar.cli.main import start

if __name__ == "__main__":
    start()
