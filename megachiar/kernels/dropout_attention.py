"""Attention with keyed dropout of its probabilities, in torch: only one block of probabilities exists at a time.

Each query of a head is a row of dropout, and the positions of the keys are its columns: see ``dropout``.

Shapes: B = sequences, T = keys of a sequence, S = queries of a sequence, h = heads, c = channels of a head. One block
has b sequences and s queries of each, which see t keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.dropout import Dropper, KeyedDropout, head_keys

CPU_QUERIES = 128
"""Queries of a block on a CPU: such a block stays in the caches, and covers few keys that its queries do not see."""
PROBABILITIES = 2**24
"""The most probabilities that a block may have."""


def dropout_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Compute attention of queries to the keys of their document up to their own position, with dropout.

    Args:
        q: (B, h, S, c).
        k, v: (B, h, T, c).
        positions: (B, S) int64, of the queries.
        options: with dropout keys (B * S,) and document starts (B, S).

    Returns:
        (B, h, S, c). Probabilities and sums are fp32 (fp64 for fp64 input).
    """
    dropout = options.dropout
    assert dropout is not None
    blocks = _blocks(positions, q.shape[1], k.shape[2], *_at_once(positions, q.device))
    scale = 1 / math.sqrt(q.shape[-1]) if options.scale is None else options.scale
    mask_arguments = dropout.probability, dropout.site, options.first_head
    keys = dropout.keys.view(positions.shape)
    return _DropoutAttention.apply(
        q, k, v, positions.to(q.device), options.document_starts, keys, blocks, scale, mask_arguments
    )


class _Block(NamedTuple):
    """Queries whose products are computed at once.

    Attributes:
        sequences, queries: the slices of the queries.
        first: all queries of the block see the keys before this one (within their documents).
        end: no query of the block sees this key or a later one.
    """

    sequences: slice
    queries: slice
    first: int
    end: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor (B, h, S, ...) that belongs to the block's queries."""
        return tensor[self.sequences, :, self.queries]

    def seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the keys or values that the block's queries see, of (B, h, T, c)."""
        return tensor[self.sequences, :, : self.end]


def _at_once(positions: torch.Tensor, device: torch.device) -> tuple[int, int]:
    """Return how many sequences and queries a block has, if that is not too large."""
    sequences, queries = positions.shape
    return (1, min(CPU_QUERIES, queries)) if device.type == "cpu" else (sequences, queries)


def _blocks(positions: torch.Tensor, heads: int, keys: int, together: int, size: int) -> list[_Block]:
    """Cut all queries into blocks of ``together`` sequences, which divide B, and at most ``size`` queries of each."""
    size = max(1, min(size, PROBABILITIES // (together * heads * keys)))
    parts = positions.view(-1, together, positions.shape[1]).split(size, 2)
    bounds = torch.stack([torch.stack([p.amin((1, 2)), p.amax((1, 2))], -1) for p in parts], 1) + 1
    return [
        _Block(slice(i * together, (i + 1) * together), slice(j * size, (j + 1) * size), first, end)
        for i, of_sequences in enumerate(bounds.tolist())  # one copy from the device for all blocks
        for j, (first, end) in enumerate(of_sequences)
    ]


class _DropoutAttention(torch.autograd.Function):
    """The backward pass computes probabilities and their masks again, instead of keeping them."""

    @staticmethod
    def forward(ctx, q, k, v, positions, document_starts, keys, blocks, scale, mask_arguments):
        ctx.blocks = blocks
        ctx.scale = scale
        ctx.mask_arguments = mask_arguments
        product, wide = _types(q)
        probability, site, first_head = mask_arguments
        drop = _dropper(q, k, keys, probability, site, first_head)
        query, key, value = (t.to(product) for t in (q, k, v))
        output = torch.empty_like(q)
        scales = q.new_empty(*q.shape[:3], 1, dtype=wide)  # log-sum-exp of each row
        for block in blocks:
            weights = _scores(block, query, key, positions, document_starts, scale, wide)
            top = weights.amax(-1, keepdim=True)
            total = weights.sub_(top).exp_().sum(-1, keepdim=True)
            block.of(scales).copy_(total.log().add_(top))
            _dropped(drop, block, weights, weights)
            block.of(output).copy_((weights.to(product) @ block.seen(value)) / total)
        ctx.save_for_backward(q, k, v, positions, document_starts, keys, output, scales)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, positions, document_starts, keys, output, scales = ctx.saved_tensors
        inputs = q, k, v
        product, wide = _types(gradient)
        probability, site, first_head = ctx.mask_arguments
        drop = _dropper(q, k, keys, probability, site, first_head)
        inner = (gradient.to(wide) * output).sum(-1, keepdim=True)  # (B, h, S, 1)
        q, k, v, gradient = (t.to(product) for t in (*inputs, gradient))
        of_q = torch.empty_like(q, dtype=wide)
        of_k, of_v = (torch.zeros_like(t, dtype=wide) for t in (k, v))
        for block in ctx.blocks:
            weights = _scores(block, q, k, positions, document_starts, ctx.scale, wide).sub_(block.of(scales)).exp_()
            dropped = _dropped(drop, block, weights, torch.empty_like(weights))
            of_output = block.of(gradient)
            block.seen(of_v).add_(dropped.to(product).mT @ of_output)
            # d loss / d scores = dropped * (of_output @ v^T) - weights * inner
            slope = (of_output @ block.seen(v).mT).to(wide).mul_(dropped).sub_(weights.mul_(block.of(inner)))
            slope = slope.to(product)
            block.of(of_q).copy_(slope @ block.seen(k))
            block.seen(of_k).add_(slope.mT @ block.of(q))
        gradients = of_q.mul_(ctx.scale), of_k.mul_(ctx.scale), of_v
        return *(g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)), *[None] * 6


def _types(q: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the type of the factors of products, and the type of probabilities and sums."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # A CPU may have no fast products of 16-bit numbers: those of fp16 can take twenty times as long.
    return wide if q.device.type == "cpu" else q.dtype, wide


def _dropper(
    q: torch.Tensor, k: torch.Tensor, keys: torch.Tensor, probability: float, site: int, first_head: int
) -> Dropper:
    """Return the dropper of probabilities; its keys are (B, h, S)."""
    of_heads = head_keys(keys, first_head, q.shape[1]).transpose(1, 2)
    return Dropper(KeyedDropout(probability, of_heads, site), k.shape[2])


def _scores(
    block: _Block,
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    document_starts: torch.Tensor | None,
    scale: float,
    wide: torch.dtype,
) -> torch.Tensor:
    """Compute the scaled products (b, h, s, t): -inf where a key is behind the query or in another document."""
    scores = (block.of(q) @ block.seen(k).mT).to(wide).mul_(scale)
    key = torch.arange(block.first, block.end, device=q.device)
    behind = key > positions[block.sequences, None, block.queries, None]
    scores[..., block.first :] += torch.where(behind, -torch.inf, 0.0)
    if document_starts is not None:
        before = torch.arange(block.end, device=q.device) < document_starts[block.sequences, None, block.queries, None]
        scores.masked_fill_(before, -torch.inf)
    return scores


def _dropped(drop: Dropper, block: _Block, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write ``weights`` (b, h, s, t) after dropout to ``out``, and return it."""
    seen = weights.shape[-1]
    return drop(weights.view(-1, seen), block.of(drop.keys).flatten(), out.view(-1, seen)).view_as(weights)
