"""Checkpoints of other programs: the published code's are imported into run folders, and ours exported to its form."""
