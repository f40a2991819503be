"""Tensor and sequence parallelism: collectives as autograd functions, and linear layers over shards."""
