"""megachiar: distributed pretraining for CHIAR-Former language models."""

__version__ = "0.1.0"
