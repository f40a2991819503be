"""Attention of rows to the keys up to their own on a CPU: in pieces that PyTorch's flash kernel computes in place.

The queries of a sequence ascend, so that the second half of them sees every key before the middle query. That rectangle
needs no mask. Two smaller problems of the same kind remain. They are cut alike, down to leaves, whose products are
masked:

    queries                               a leaf's mask: a query sees no key behind itself
      |  leaf                             and none before its document; documents are cut
      |  rect. leaf                       apart where they are long
      |  rectangle  leaf
      |  rectangle  rect. leaf
      v                      keys ->

Each piece is one call of the kernel for all heads. A query's results over its pieces are weighted by their softmax
sums, and in the backward pass each piece works with the sums over all pieces. Rows are read without copies: nothing is
packed or padded, and no mask is kept.

Shapes: n = rows (queries), B = sequences, T = keys of a sequence, h = heads, c = channels of a head; of one piece: s
queries, which see t keys.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LEAF = 288
"""Most queries of a masked piece. It is a bit more than a power of two: where about half of the tokens of such a length
are routed, they are one leaf, or two."""
SMALL = 256
"""With fewer queries the backward pass of a rectangle is faster in fp32 than in 16 bits, as it is for all leaves."""
MOST_PADDED = 1.25
"""The most that padding may multiply the number of queries by, where sequences of few queries share one call."""
CAUSAL_FROM = 768
"""With at least so many queries the kernel's own causal mask is fastest, where every token of a stretch is a query: the
kernel takes larger blocks then."""
ROUNDED_TO = 32
"""Queries and keys of 16-bit products are rounded up to a multiple of this: oneDNN compiles a kernel for each size."""


class QuerySpans(NamedTuple):
    """Queries of each sequence and the span of keys that each of them sees; on the host.

    Attributes:
        query_starts: B + 1 ints: rows ``query_starts[b]`` to ``query_starts[b + 1]`` are of sequence b.
        last_seen: (n,) int64, the last key that each row sees; ascending in a sequence.
        first_seen: (n,) int64, the first one; None if that is 0.
        key_starts: the same as ``query_starts`` for keys that are stored as rows; None if they are a (B, h, T, c)
            tensor.
    """

    query_starts: list[int]
    last_seen: torch.Tensor
    first_seen: torch.Tensor | None
    key_starts: list[int] | None = None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: QuerySpans, scale: float | None) -> torch.Tensor:
    """Compute attention of each query row to the span of keys that it sees.

    Args:
        q: (n, h, c).
        k, v: (B, h, T, c), or rows (m, h, c).
        spans: the queries of each sequence, and the span of keys that each of them sees.
        scale: factor of the products; 1 / sqrt(c) if None.

    Returns:
        (n, h, c).
    """
    together = _Together.of(spans, k, _rounding(q.dtype)) if k.ndim == 4 else None
    if together is not None:
        return _AttendTogether.apply(q, k, v, together, scale)
    return _Attend.apply(q, k, v, spans, scale)


class _Together(NamedTuple):
    """Sequences of few queries for one call: none has more than a leaf, and all are padded to the longest.

    Attributes:
        sequences: B.
        length: S, the number of queries that each sequence is padded to.
        padded_rows: (n,) int64, index of each row among the B * S padded ones.
        last_seen, first_seen: (B, S), as in ``QuerySpans``.
    """

    sequences: int
    length: int
    padded_rows: torch.Tensor
    last_seen: torch.Tensor
    first_seen: torch.Tensor | None

    @classmethod
    def of(cls, spans: QuerySpans, k: torch.Tensor, rounding: int) -> _Together | None:
        """Put the sequences together.

        Returns:
            None where a sequence is too long, or where they are so unequal that padding costs more than calls.
        """
        counts = [end - start for start, end in itertools.pairwise(spans.query_starts)]
        length = _up(max(counts), rounding)
        if not 1 < len(counts) <= MOST_PADDED * len(spans.last_seen) / length or length > LEAF:
            return None
        shift = [b * length - start for b, start in enumerate(spans.query_starts[:-1])]
        padded_rows = torch.arange(len(spans.last_seen))
        padded_rows += torch.tensor(shift).repeat_interleave(torch.tensor(counts), output_size=len(padded_rows))

        def padded(seen: torch.Tensor, of_padding: int) -> torch.Tensor:
            return seen.new_full((len(counts) * length,), of_padding).index_copy_(0, padded_rows, seen).view(-1, length)

        return cls(
            sequences=len(counts),
            length=length,
            padded_rows=padded_rows,
            last_seen=padded(spans.last_seen, k.shape[2] - 1),  # padding sees all: its sums are finite
            first_seen=padded(spans.first_seen, 0) if spans.first_seen is not None else None,
        )

    def padded(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Pad (n, h, c) to (B, h, S, c) in ``dtype``, or (n, h) to (B, h, S), with zeros."""
        if len(x) == self.sequences * self.length:
            whole = x.to(dtype)
        else:
            whole = x.new_zeros(self.sequences * self.length, *x.shape[1:], dtype=dtype)
            whole.index_copy_(0, self.padded_rows, x.to(dtype))
        return whole.unflatten(0, (self.sequences, self.length)).transpose(1, 2)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Invert ``padded``: take (n, h, c) out of (B, h, S, c), or (n, h) out of (B, h, S)."""
        whole = x.transpose(1, 2).flatten(0, 1)
        return whole if len(whole) == len(self.padded_rows) else whole.index_select(0, self.padded_rows)

    def mask(self, keys: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the mask (B, 1, S, T) that is added to the products."""
        key = torch.arange(keys)
        hidden = key > self.last_seen[..., None]
        if self.first_seen is not None:
            hidden |= key < self.first_seen[..., None]
        return _hiding(hidden, dtype)[:, None]


class _AttendTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, together, scale):
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            together.padded(q, q.dtype),
            k,
            v,
            dropout_p=0.0,
            is_causal=False,
            attn_mask=together.mask(k.shape[2], q.dtype),
            scale=scale,
        )
        result, sums = together.rows(result), together.rows(sums)
        ctx.save_for_backward(q, k, v, result, sums)
        ctx.together, ctx.scale = together, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (q, k, v, result, sums), together = ctx.saved_tensors, ctx.together
        wide = _wide(q.dtype)  # as in leaves
        of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(together.padded(x, wide) for x in (gradient, q)),
            k.to(wide),
            v.to(wide),
            *(together.padded(x, wide) for x in (result, sums)),
            dropout_p=0.0,
            is_causal=False,
            attn_mask=together.mask(k.shape[2], wide),
            scale=ctx.scale,
        )
        return together.rows(of_q).to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None, None


class _Piece(NamedTuple):
    """A piece of the work: queries ``first`` to ``last - 1`` of a sequence and its keys ``key`` to ``key_end - 1``.

    Attributes:
        first, last: the queries, by their numbers in the sequence.
        key, key_end: the keys, by their numbers in the sequence.
        first_seen, until: the queries of a leaf see at most the keys ``first_seen`` to ``until - 1``; ``until`` is None
            for a rectangle, whose queries see all its keys.
        causal: whether the queries of a leaf stand at these very keys, so that the kernel's own causal mask serves.
    """

    first: int
    last: int
    key: int
    key_end: int
    first_seen: int = 0
    until: int | None = None
    causal: bool = False

    @property
    def seen(self) -> slice:
        return slice(self.key, self.key_end)


class _Sequence(NamedTuple):
    """The pieces of one sequence.

    Attributes:
        queries: the slice of its queries among all rows.
        keys: the slice of its keys among all rows of keys, or the slice of one sequence.
        leaves, rectangles: its pieces, in ascending order.
    """

    queries: slice
    keys: slice
    leaves: list[_Piece]
    rectangles: list[_Piece]

    def rows(self, piece: _Piece) -> slice:
        """Return the slice of a piece's queries among all rows."""
        return slice(self.queries.start + piece.first, self.queries.start + piece.last)

    def keys_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return this sequence's keys or values ``x`` as (1, h, t, c)."""
        return x[self.keys] if x.ndim == 4 else x[self.keys].transpose(0, 1)[None]


def _plan(spans: QuerySpans, k: torch.Tensor, rounding: int) -> list[_Sequence]:
    """Cut the work of all sequences into pieces."""
    result = []
    for b, (start, end) in enumerate(itertools.pairwise(spans.query_starts)):
        keys = slice(b, b + 1) if spans.key_starts is None else slice(*spans.key_starts[b : b + 2])
        sequence = _Sequence(slice(start, end), keys, [], [])
        last_seen = spans.last_seen[start:end]
        first_seen = spans.first_seen[start:end] if spans.first_seen is not None else None
        for first, last, key in _documents(last_seen, first_seen):
            _cut(sequence, last_seen, first, last, key, sequence.keys_of(k).shape[2], rounding)
        result.append(sequence)
    return result


def _documents(last_seen: torch.Tensor, first_seen: torch.Tensor | None) -> Iterator[tuple[int, int, int]]:
    """Yield (first query, end of the queries, first key) of documents.

    A document with more queries than a leaf comes alone; others come in groups of neighbours that fit in a leaf.
    """
    if first_seen is None:
        if len(last_seen):
            yield 0, len(last_seen), 0
        return
    begun = closed = 0
    for end in [*(first_seen.diff().nonzero().flatten() + 1).tolist(), len(first_seen)]:
        if end - begun > LEAF and closed > begun:
            yield begun, closed, int(first_seen[begun])
            begun = closed
        closed = end
    if closed > begun:
        yield begun, closed, int(first_seen[begun])


def _cut(
    sequence: _Sequence, last_seen: torch.Tensor, first: int, last: int, first_seen: int, keys: int, rounding: int
) -> None:
    """Add the pieces of queries ``first`` to ``last - 1`` for the keys from ``first_seen`` on."""
    until = int(last_seen[last - 1]) + 1
    if until - first_seen == last - first >= CAUSAL_FROM:
        end = min(keys, first_seen + _up(until - first_seen, rounding))
        sequence.leaves.append(_Piece(first, last, first_seen, end, first_seen, until, causal=True))
        return
    if last - first <= LEAF:
        width = min(keys, _up(until - first_seen, rounding))
        key = min(first_seen, keys - width)
        sequence.leaves.append(_Piece(first, last, key, key + width, first_seen, until))
        return
    middle = first + _up((last - first) // 2, rounding)
    # Every query of a leaf sees at least one key of the leaf: its own.
    split = first_seen + (int(last_seen[middle]) - first_seen) // rounding * rounding
    _cut(sequence, last_seen, first, middle, first_seen, keys, rounding)
    if split > first_seen:
        sequence.rectangles.append(_Piece(middle, last, first_seen, split))
    _cut(sequence, last_seen, middle, last, split, keys, rounding)


def _up(number: int, rounding: int) -> int:
    return -(-number // rounding) * rounding


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spans, scale):
        work = _plan(spans, k, _rounding(q.dtype))
        # Leaves hold each row once, in order.
        leaves = [_results(leaf, sequence, q, k, v, spans, scale) for sequence in work for leaf in sequence.leaves]
        results, sums = (torch.cat(x) for x in zip(*leaves, strict=True))
        wide = _wide(q.dtype) if any(sequence.rectangles for sequence in work) else q.dtype
        results = results.to(wide)
        for sequence in work:
            for rectangle in sequence.rectangles:
                rows = sequence.rows(rectangle)
                result, total = _results(rectangle, sequence, q, k, v, spans, scale)
                both = torch.logaddexp(sums[rows], total)
                results[rows].lerp_(result.to(wide), (total - both).exp_()[..., None])
                sums[rows] = both
        results = results.to(q.dtype)
        ctx.save_for_backward(q, k, v, results, sums)
        ctx.spans = spans
        ctx.work = work
        ctx.scale = scale
        ctx.wide = wide
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        kept = q, k, v, *_ = ctx.saved_tensors
        slopes = functools.partial(_slopes, kept=kept, gradient=gradient, spans=ctx.spans, scale=ctx.scale)
        leaves_of_q = []
        of_k, of_v = torch.empty_like(k, dtype=ctx.wide), torch.empty_like(v, dtype=ctx.wide)
        for sequence in ctx.work:
            filled = 0  # keys whose gradients are more than what memory held
            of_keys, of_values = sequence.keys_of(of_k), sequence.keys_of(of_v)
            for leaf in sequence.leaves:
                part_q, *parts = slopes(leaf, sequence)
                leaves_of_q.append(part_q)
                for whole, part in zip((of_keys, of_values), parts, strict=True):
                    _fill(whole, filled, leaf, part)
                filled = leaf.until
            if filled < of_keys.shape[2]:
                of_keys[:, :, filled:], of_values[:, :, filled:] = 0, 0
        of_q = torch.cat(leaves_of_q).to(ctx.wide)
        for sequence in ctx.work:
            of_keys, of_values = sequence.keys_of(of_k), sequence.keys_of(of_v)
            for rectangle in sequence.rectangles:
                part_q, part_k, part_v = slopes(rectangle, sequence)
                of_q[sequence.rows(rectangle)] += part_q
                of_keys[:, :, rectangle.seen] += part_k
                of_values[:, :, rectangle.seen] += part_v
        return of_q.to(q.dtype), of_k.to(q.dtype), of_v.to(q.dtype), None, None


def _results(
    piece: _Piece, sequence: _Sequence, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: QuerySpans, scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute results (s, h, c) of a piece's queries over its keys alone, and logarithms (s, h) of the softmax sums."""
    rows, count = sequence.rows(piece), piece.last - piece.first
    keys, values = (sequence.keys_of(x)[:, :, piece.seen] for x in (k, v))
    result, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _by_head(q[rows]),
        keys,
        values,
        dropout_p=0.0,
        is_causal=piece.causal,
        attn_mask=_mask(piece, rows, spans, q.dtype),
        scale=scale,
    )
    return result[0].transpose(0, 1)[:count], total[0].T[:count]


def _slopes(piece: _Piece, sequence: _Sequence, kept, gradient, spans: QuerySpans, scale) -> tuple[torch.Tensor, ...]:
    """Compute a piece's addends of the gradients of its queries (s, h, c), keys and values (1, h, t, c)."""
    q, k, v, results, sums = kept
    rows, dtype = sequence.rows(piece), _backward_type(piece, q.dtype)
    of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_by_head(x[rows].to(dtype)) for x in (gradient, q)),
        *(sequence.keys_of(x)[:, :, piece.seen].to(dtype) for x in (k, v)),
        _by_head(results[rows].to(dtype)),
        _padded(sums[rows], dtype).T[None],
        dropout_p=0.0,
        is_causal=piece.causal,
        attn_mask=_mask(piece, rows, spans, dtype),
        scale=scale,
    )
    return of_q[0, :, : piece.last - piece.first].transpose(0, 1), of_k, of_v


def _backward_type(piece: _Piece, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a piece's products in the backward pass."""
    narrow = piece.causal or (piece.until is None and piece.last - piece.first >= SMALL)
    return dtype if narrow else _wide(dtype)


def _fill(whole: torch.Tensor, filled: int, leaf: _Piece, part: torch.Tensor) -> None:
    """Write a leaf's part (1, h, t, c) of a gradient behind the parts of earlier leaves, which end at key ``filled``.

    Where they overlap it is added. Keys that no leaf sees get zeros.
    """
    assert leaf.until is not None
    new = max(filled, leaf.first_seen)
    if new > filled:
        whole[:, :, filled:new] = 0
    if new > leaf.first_seen:
        whole[:, :, leaf.first_seen : new] += part[:, :, leaf.first_seen - leaf.key : new - leaf.key]
    whole[:, :, new : leaf.until] = part[:, :, new - leaf.key : leaf.until - leaf.key]


def _mask(piece: _Piece, rows: slice, spans: QuerySpans, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the mask (1, 1, s, t) that is added to a leaf's products; None where none is needed."""
    if piece.until is None or piece.causal:
        return None
    key = torch.arange(piece.key, piece.key_end)
    hidden = key > spans.last_seen[rows, None]
    if spans.first_seen is not None:
        hidden |= key < spans.first_seen[rows, None].clamp(min=piece.first_seen)
    elif piece.key < piece.first_seen:
        hidden |= key < piece.first_seen
    return _padded(_hiding(hidden, dtype), dtype)[None, None]


def _hiding(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return -inf where a key is hidden, and 0 elsewhere."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """Turn rows (s, h, c) into (1, h, s, c)."""
    return _padded(x, x.dtype).transpose(0, 1)[None]


def _padded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pad the rows of a piece with zeros for products in ``dtype``. The gradient of such rows is zero too."""
    missing = -len(x) % _rounding(dtype)
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x


def _rounding(dtype: torch.dtype) -> int:
    """Return the number whose multiples the counts of queries and keys are rounded up to, for products in ``dtype``."""
    return ROUNDED_TO if dtype.itemsize == 2 else 1


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type for sums of the pieces' results: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
