"""Tensor and sequence parallelism: collectives as autograd functions, linear layers over shards, rows over ranks."""
