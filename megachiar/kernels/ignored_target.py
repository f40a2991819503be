"""Name the target that no loss counts. It needs no torch, so that readers of data can take it from here."""

IGNORED_TARGET = -100
"""PyTorch's cross-entropy leaves out such targets, too."""
