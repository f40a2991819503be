"""The commands: each module is what ``megachiar COMMAND`` of its name does. ``main.py`` finds and starts them."""
