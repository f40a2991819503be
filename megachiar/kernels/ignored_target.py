"""Name the numbers that stand where there is no target, and no token. Readers of data take them without torch."""

IGNORED_TARGET = -100
"""PyTorch's cross-entropy leaves out such targets, too."""
PADDING = -1
"""Fills a labelled sequence up to the sequence length."""
