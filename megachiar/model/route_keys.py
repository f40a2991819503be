"""The keys by which a random router draws routes: what a route depends on besides the router's seed and the layer.

    samples      the number of the sample and the position in it: each token of each sample has a draw of its own
    documents    where attention keeps to documents: the tokens of the document up to the position, and the position in
                 it. A document then takes the routes that it takes alone, wherever it stands and whatever is around it.

Neither depends on micro-batches, ranks or stages. Documents that begin alike take the same routes as long as they are
alike: nothing else could tell them apart without looking at what surrounds them, or at tokens that are still to come.

Shapes: B = sequences, T = tokens of a sequence in this pass.
"""

from __future__ import annotations

import torch

from megachiar.kernels.dropout import row_keys
from megachiar.kernels.hash import GOLDEN, mix64, wrap64


def keys_of_samples(seed: int, sample_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the keys (B, T) int64 of the tokens at ``positions`` (T,) of the samples ``sample_ids`` (B,) int64."""
    return row_keys(seed, sample_ids[:, None], positions)


def keys_of_documents(seed: int, prefixes: torch.Tensor) -> torch.Tensor:
    """Return the keys (B, T) int64 of tokens whose documents have ``prefixes`` from ``hash_prefixes``."""
    return mix64(prefixes + wrap64((seed + 1) * GOLDEN))


def hash_prefixes(
    tokens: torch.Tensor, document_starts: torch.Tensor, positions: torch.Tensor, before: torch.Tensor | None = None
) -> torch.Tensor:
    """Hash the part of its document that ends with each token: the sum of a hash of each token and its position there.

    Args:
        tokens: (B, T) int64.
        document_starts: (B, T) int64, position in the sequence of the first token of each token's document.
        positions: (T,) int64, of the tokens in their sequences.
        before: (B,) int64, the hashes of the tokens just before these, which a cache keeps. All tokens belong to their
            documents then. None where the pass begins with the sequences.

    Returns:
        (B, T) int64.
    """
    numbers = mix64(mix64(tokens) + (positions - document_starts + 1) * GOLDEN)
    sums = numbers.cumsum(1)  # modulo 2^64
    if before is not None:
        return sums + before[:, None]
    return sums - (sums - numbers).gather(1, document_starts)
