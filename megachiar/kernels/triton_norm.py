"""Residual addition and LayerNorm in Triton, with one pass over the rows forward and one backward.

Rows of two operators are normalised together, each with the branch, the weight and the bias of its operator.

Shapes: n = rows, d = channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megachiar.kernels.gpu import INTERPRETED, jit, launch_options, tl, triton

WIDEST = 16384
"""The most channels that a program can hold of a row."""
PROGRAMS = 1056
"""The most programs of the backward pass: eight for each multiprocessor of an H100. Each program sums the gradients of
weight and bias over its rows."""


class Normed(NamedTuple):
    """The result of a LayerNorm, and the tensors that its backward pass needs.

    Attributes:
        rows: (n, d), the result.
        sums: (n, d), the rows that were normalised.
        mean, scale: (n,) fp32, the mean of each row and the reciprocal of its standard deviation.
    """

    rows: torch.Tensor
    sums: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor


def supports(x: torch.Tensor) -> bool:
    """Return whether the kernels take rows (n, d) like these."""
    return x.shape[-1] <= WIDEST and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class Other(NamedTuple):
    """What is different for the rows of a second operator.

    Attributes:
        routes: (n,) int64, 0 for the rows of the second operator.
        branch_output: (n, d), the output of the branch in these rows; its other rows are not read. None if no branch is
            added.
        weight, bias: (d,).
    """

    routes: torch.Tensor
    branch_output: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor


def normed(
    x: torch.Tensor,
    branch_output: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    other: Other | None = None,
) -> Normed:
    """Normalise ``x + branch_output`` (n, d), or ``x`` alone.

    With ``other`` its branch, weight and bias are taken in the rows of its operator: those of ``branch_output`` are not
    read.
    """
    x = x.contiguous()
    n, d = x.shape
    added = branch_output is not None
    branch_output = x if branch_output is None else branch_output.contiguous()
    second = Other(x, branch_output, weight, bias) if other is None else other
    sums = torch.empty_like(x) if added else x
    rows = torch.empty_like(x)
    mean, scale = (torch.empty(n, dtype=torch.float32, device=x.device) for _ in range(2))
    if n:
        _norm[(n,)](
            x,
            branch_output,
            weight,
            bias,
            second.routes,
            x if second.branch_output is None else second.branch_output.contiguous(),
            second.weight,
            second.bias,
            sums,
            rows,
            mean,
            scale,
            EPSILON=epsilon,
            ADDED=added,
            OTHER=other is not None,
            **_constants(d),
        )
    return Normed(rows, sums, mean, scale)


def norm_backward(
    gradient: torch.Tensor,
    sums: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    routes: torch.Tensor | None = None,
    other_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the rows that were normalised (n, d), and of weight and bias as one tensor (2, d).

    With ``routes`` and ``other_weight`` of a second operator it is (4, d): behind these two come its weight and bias.
    """
    gradient = gradient.contiguous()
    n, d = gradient.shape
    result = torch.empty_like(sums)
    programs = max(1, min(n, 4 if INTERPRETED else PROGRAMS))
    has_other = routes is not None
    parts = torch.empty(4 if has_other else 2, programs, d, dtype=torch.float32, device=sums.device)
    _norm_backward[(programs,)](
        gradient,
        sums,
        mean,
        scale,
        weight,
        sums if routes is None else routes,
        weight if other_weight is None else other_weight,
        result,
        parts,
        n,
        OTHER=has_other,
        **_constants(d),
    )
    return result, parts.sum(1).to(weight.dtype)


def _constants(d: int) -> dict:
    """Return the options that the kernels are compiled with."""
    columns = triton.next_power_of_2(d)
    return launch_options(min(16, max(1, columns // 512))) | {"D": d, "COLUMNS": columns}


def _norm_kernel(
    x,
    branch_output,
    weight,
    bias,
    routes,
    other_branch_output,
    other_weight,
    other_bias,
    sums_out,
    out,
    means,
    scales,
    EPSILON: tl.constexpr,
    ADDED: tl.constexpr,
    OTHER: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < D
    offset = row * D + column
    if OTHER:  # noqa: SIM102 (this is decided when the kernel is compiled, the rest when it runs)
        if tl.load(routes + row) == 0:
            branch_output, weight, bias = other_branch_output, other_weight, other_bias
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(branch_output + offset, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(sums_out.dtype.element_ty)
        tl.store(sums_out + offset, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / D
    centred = tl.where(inside, value - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPSILON)
    of_weight = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    of_bias = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, (centred * scale * of_weight + of_bias).to(out.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)


def _norm_backward_kernel(
    gradient,
    sums,
    means,
    scales,
    weight,
    routes,
    other_weight,
    out,
    parts,
    n,
    OTHER: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    inside = column < D
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros((COLUMNS,), tl.float32)
    of_bias = tl.zeros((COLUMNS,), tl.float32)
    if OTHER:
        first_factor = factor
        other_factor = tl.load(other_weight + column, mask=inside, other=0.0).to(tl.float32)
        of_other_weight = tl.zeros((COLUMNS,), tl.float32)
        of_other_bias = tl.zeros((COLUMNS,), tl.float32)
    for row in range(tl.program_id(0), n, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * D + column
        slope = tl.load(gradient + offset, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(sums + offset, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        normal = tl.where(inside, (value - tl.load(means + row)) * scale, 0.0)
        if OTHER:
            if tl.load(routes + row) == 0:
                of_other_weight += slope * normal
                of_other_bias += slope
                factor = other_factor
            else:
                of_weight += slope * normal
                of_bias += slope
                factor = first_factor
        else:
            of_weight += slope * normal
            of_bias += slope
        slope *= factor
        along, level = tl.sum(slope * normal, 0) / D, tl.sum(slope, 0) / D
        result = (slope - level - normal * along) * scale
        tl.store(out + offset, result.to(out.dtype.element_ty), mask=inside)
    at = parts + tl.program_id(0) * D + column
    step = tl.num_programs(0) * D
    tl.store(at, of_weight, mask=inside)
    tl.store(at + step, of_bias, mask=inside)
    if OTHER:
        tl.store(at + 2 * step, of_other_weight, mask=inside)
        tl.store(at + 3 * step, of_other_bias, mask=inside)


_norm = jit(_norm_kernel)
_norm_backward = jit(_norm_backward_kernel)
