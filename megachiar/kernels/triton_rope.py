"""Rotary position embedding in one Triton kernel, forward and backward.

Shapes: n = rows, h = heads, c = channels of a head, r = rows of the tables.
"""

from __future__ import annotations

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
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, HALF)[None, :]
    inside = (head < H) & (channel < C // 2)
    at = (row % repeat) * C + C // 2 + channel  # the second halves of the tables, where sin is not negated
    cosine = tl.load(cos + at, mask=channel < C // 2, other=0.0).to(tl.float32)
    sine = tl.load(sin + at, mask=channel < C // 2, other=0.0).to(tl.float32)
    if BACK:
        sine = -sine
    offset = row * row_stride + head * head_stride + channel
    first = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + offset + C // 2, mask=inside, other=0.0).to(tl.float32)
    to = row * out_row_stride + head * out_head_stride + channel
    tl.store(out + to, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + C // 2, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)


_rotate = jit(_kernel)
