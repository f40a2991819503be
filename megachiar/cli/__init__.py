"""Each module is the command of its name; ``main.py`` finds and starts it."""
