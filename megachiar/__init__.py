"""megachiar: distributed pretraining for CHIAR-Former language models."""

import os

__version__ = "0.1.0"

# Read when torch loads its OpenMP library, so before anything here imports torch. Threads that wait for each other spin
# briefly, then sleep: where cores are shared, with other ranks or whatever else a laptop does, long spinning keeps the
# thread that all wait for from running, and a step takes many times longer.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
