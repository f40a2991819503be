"""Rotary position embedding in Triton, forward and backward: of one tensor, or of queries and keys in one launch.

Shapes: n = rows, h = heads, c = channels of a head, r = rows of the tables, N = rows of a micro-batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megachiar.kernels.gpu import jit, launch_options, tl, triton

WIDEST = 16384
"""The most channels, of all heads together, that a program can hold of a row."""


def supports(x: torch.Tensor, cos: torch.Tensor) -> bool:
    """Return whether the kernel takes ``x`` (..., h, c) with tables (..., 1, c) that repeat over leading dimensions."""
    *rows, heads, c = x.shape
    tables = list(cos.shape[:-2])
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and cos.dim() > 2
        and cos.shape[-2] == 1
        and tables == rows[len(rows) - len(tables) :]
        and heads * triton.next_power_of_2(c) <= WIDEST
        and c % 2 == 0
    )


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate the pairs of channels of ``x`` by the angles of the tables, or rotate them back.

    Args:
        x: (..., h, c).
        cos, sin: tables (..., 1, c), as ``supports`` wants them.
        back: whether to rotate by the negative angles.
        out: where to write the result, with evenly spaced rows and heads; it may be ``x``. None for a new tensor.

    Returns:
        ``out``, or a contiguous tensor in the shape of ``x``.
    """
    heads, c = x.shape[-2:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if x.numel() == 0:
        return out
    rows = x.flatten(0, -3)  # without a copy where the rows lie evenly
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    into = out.view(-1, heads, c) if out.is_contiguous() else out.flatten(0, -3)
    assert into.data_ptr() == out.data_ptr() and into.stride(-1) == 1
    cos, sin = (t.reshape(-1, c).contiguous() for t in (cos, sin))
    half = triton.next_power_of_2(c // 2)
    _rotate[(len(rows),)](
        rows,
        cos,
        sin,
        into,
        *rows.stride()[:2],
        *into.stride()[:2],
        len(cos),
        BACK=back,
        H=heads,
        C=c,
        HEADS=triton.next_power_of_2(heads),
        HALF=half,
        **launch_options(4 if heads * half > 512 else 1),
    )
    return out


@jit
def _turn(
    x,
    out,
    head_stride,
    out_head_stride,
    cos,
    sin,
    position,
    BACK: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate the heads of a row from ``x`` to ``out``, which may be the same."""
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, HALF)[None, :]
    inside = (head < H) & (channel < C // 2)
    at = position * C + C // 2 + channel  # the second halves of the tables, where sin is not negated
    cosine = tl.load(cos + at, mask=channel < C // 2, other=0.0).to(tl.float32)
    sine = tl.load(sin + at, mask=channel < C // 2, other=0.0).to(tl.float32)
    if BACK:
        sine = -sine
    offset = head * head_stride + channel
    first = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + offset + C // 2, mask=inside, other=0.0).to(tl.float32)
    to = head * out_head_stride + channel
    tl.store(out + to, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + C // 2, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)


def _kernel(
    x,
    cos,
    sin,
    out,
    row_stride,
    head_stride,
    out_row_stride,
    out_head_stride,
    repeat,
    BACK: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    out += row * out_row_stride
    _turn(x, out, head_stride, out_head_stride, cos, sin, row % repeat, BACK, H, C, HEADS, HALF)


class Turned(NamedTuple):
    """Heads that a kernel rotates from one place to another.

    Attributes:
        source, out: (N, h, c), or ``source`` (B, T, h, c); the channels of a head lie side by side, and the heads of a
            row in ``out``. The two may be the same tensor.
    """

    source: torch.Tensor
    out: torch.Tensor

    def strides(self, length: int) -> tuple[int, int, int, int]:
        """Return the strides of sequences, rows and heads of ``source``, and of the rows of ``out``."""
        *of_sequence, row, head, _ = self.source.stride()
        return of_sequence[0] if of_sequence else length * row, row, head, self.out.stride(0)


def supports_both(heads: int, c: int, dtype: torch.dtype) -> bool:
    """Return whether ``rotate_both`` takes so many heads with ``c`` channels each."""
    by_type = dtype in (torch.float32, torch.bfloat16, torch.float16)
    powers = (1 << (n - 1).bit_length() for n in (heads, c))  # a plan asks where Triton is not installed
    return by_type and math.prod(powers) <= WIDEST and c % 2 == 0


def rotate_both(
    queries: Turned,
    keys: Turned | None,
    values: Turned | None,
    tables: tuple[torch.Tensor, torch.Tensor],
    length: int,
    back: bool,
    order: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> None:
    """Rotate queries and keys by the angles of their positions, or back, and copy values, in one launch.

    Args:
        queries: row i of them is row i of the micro-batch, or that at index i of ``order``.
        keys: row i of them is row i of the micro-batch; None where there are none.
        values: what is copied as it is; None for nothing.
        tables: cos and sin (positions, c).
        length: T, rows of a sequence; row i of the micro-batch is at position i % T.
        back: whether to rotate by the negative angles.
        order: (N,) int32, an order of the rows; None for the order of the micro-batch.
        starts: (B + 1,) int32, whose last number is that of the queries that are rotated; None for all of them.
    """
    cos, sin = tables
    *_, h, c = queries.source.shape
    others = queries if keys is None else keys
    copied = others if values is None else values
    n = len(queries.out)
    heads = triton.next_power_of_2(max(h, others.source.shape[-2]))
    half = triton.next_power_of_2(c // 2)
    if n == 0:
        return
    _rotate_both[(n,)](
        queries.source,
        queries.out,
        others.source,
        others.out,
        copied.source,
        copied.out,
        cos,
        sin,
        cos if order is None else order,
        cos if starts is None else starts,
        0 if starts is None else len(starts) - 1,
        length,
        *queries.strides(length),
        *others.strides(length),
        *copied.strides(length),
        BACK=back,
        ORDERED=order is not None,
        COUNTED=starts is not None,
        KEYS=keys is not None,
        VALUES=values is not None,
        H=h,
        KEY_HEADS=others.source.shape[-2],
        C=c,
        HEADS=heads,
        HALF=half,
        **launch_options(4 if heads * half > 512 else 1),
    )


def _both_kernel(
    q,
    q_out,
    k,
    k_out,
    v,
    v_out,
    cos,
    sin,
    order,
    starts,
    sequences,
    length,
    q_sequence,
    q_row,
    q_head,
    q_out_row,
    k_sequence,
    k_row,
    k_head,
    k_out_row,
    v_sequence,
    v_row,
    v_head,
    v_out_row,
    BACK: tl.constexpr,
    ORDERED: tl.constexpr,
    COUNTED: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    H: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sequence, position = row // length, row % length
    of_query = position
    if ORDERED:
        of_query = tl.load(order + row).to(tl.int64) % length
    turned = True
    if COUNTED:
        turned = row < tl.load(starts + sequences)
    if turned:
        x = q + sequence * q_sequence + position * q_row
        _turn(x, q_out + row * q_out_row, q_head, C, cos, sin, of_query, BACK, H, C, HEADS, HALF)
    if KEYS:
        x = k + sequence * k_sequence + position * k_row
        _turn(x, k_out + row * k_out_row, k_head, C, cos, sin, position, BACK, KEY_HEADS, C, HEADS, HALF)
    if VALUES:
        head = tl.arange(0, HEADS)[:, None]
        channel = tl.arange(0, 2 * HALF)[None, :]
        inside = (head < KEY_HEADS) & (channel < C)
        x = v + sequence * v_sequence + position * v_row + head * v_head + channel
        tl.store(v_out + row * v_out_row + head * C + channel, tl.load(x, mask=inside, other=0.0), mask=inside)


_rotate = jit(_kernel)
_rotate_both = jit(_both_kernel)
