"""Attention by torch's ``scaled_dot_product_attention`` under masks, on any device: the reference of other backends.

Shapes: B = sequences, T = keys of a sequence, S = queries of a sequence, h = heads, c = channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

QUERY_CHUNK = 256
"""Queries of a sequence that share one masked product: each chunk sees only the keys up to its last position."""


def masked_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    document_starts: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Compute attention of queries to the keys of their document up to their own position.

    The queries go in chunks, each with a mask over the keys that it can see. The host waits once for their bounds.

    Args:
        q: (B, h, S, c).
        k, v: (B, h, T, c).
        positions: (B, S) int64, of the queries, ascending but for padding.
        document_starts: (B, S) int64, position of the first key that each query sees; 0 if None.
        scale: factor of the products; 1 / sqrt(c) if None.

    Returns:
        (B, h, S, c).
    """
    lasts = positions.split(QUERY_CHUNK, 1)
    if document_starts is None:
        firsts = [torch.zeros_like(part) for part in lasts]
    else:
        firsts = list(document_starts.split(QUERY_CHUNK, 1))
    bounds = torch.stack([torch.stack([f.min(), a.max() + 1]) for f, a in zip(firsts, lasts, strict=True)])
    outputs = []
    for queries, last, start, (first, end) in zip(
        q.split(QUERY_CHUNK, 2), lasts, firsts, bounds.tolist(), strict=True
    ):  # one copy to the host
        key = torch.arange(first, end, device=q.device)
        seen = (key <= last[:, None, :, None]) & (key >= start[:, None, :, None])
        seen |= ~seen.any(-1, keepdim=True)  # padding
        outputs.append(
            F.scaled_dot_product_attention(queries, k[:, :, first:end], v[:, :, first:end], attn_mask=seen, scale=scale)
        )
    return torch.cat(outputs, 2)
