"""megachiar: distributed pretraining for CHIAR-Former language models."""

import os

__version__ = "0.1.0"

# Read when torch loads its OpenMP library, so before anything here imports torch. Threads that wait for each other spin
# briefly, then sleep. Other ranks and programs share the cores. There long spinning would keep the thread that all wait
# for from running, and a step would take many times longer.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
