"""Products of the rows of each operator in Triton, between bounds that the kernels read on the device.

    _products    out[row] = rows[row] W + bias       a program has a tile of one operator's rows, gathered and scattered
                                                     by the operator order on the way
    _weights     sum over rows of g[row]^T x[row]    a program has a tile of one weight's gradient, and goes through all
                                                     rows of its operator

The attention rows are the first ``count`` of the operator order, the DCT rows those behind them. Programs that are left
without rows end at once. Rows of the other operator are neither read nor written.

Shapes: N = rows, d = channels, i = inputs, o = outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megachiar.kernels.gpu import INTERPRETED, compute_type, jit, launch_options, product_precision, tl, triton


class Tiles(NamedTuple):
    """The rows, columns and inner numbers of a product that a program works on at once, and how it is compiled.

    In ``_weights`` the inner numbers are rows, and the rows and columns are those of the weight.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype) -> Tiles:
    """Return the sizes for products of ``dtype``.

    They compile for sm_90 and sm_100 without spilled registers, which ``tests/kernels/test_triton.py`` checks, and were
    not timed yet.
    """
    if INTERPRETED:
        return Tiles(16, 64, 64, 4, 1)
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2)
    return Tiles(128, 128, 64, 8, 3)


def supports(x: torch.Tensor) -> bool:
    """Return whether the kernels take rows (N, d) like these."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """Rows that a kernel reads or writes.

    Attributes:
        values: (N, columns), the columns side by side in memory.
        in_operator_order: whether row i is the i-th of the operator order; else it is row i of the micro-batch.
    """

    values: torch.Tensor
    in_operator_order: bool


class Product(NamedTuple):
    """The product of one operator's rows with a matrix.

    Attributes:
        rows: with i columns.
        matrix: (i, o), in any layout.
        bias: (o,); None for none.
        out: where to write the result, with o columns.
    """

    rows: Rows
    matrix: torch.Tensor
    bias: torch.Tensor | None
    out: Rows


def input_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    matrix: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``row_products.input_products``."""
    rows = Rows(_dense(x), False)
    product, mixed = x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(matrix))
    of_attention = Product(rows, weight.mT, bias, Rows(product, True))
    _multiply(of_attention, Product(rows, matrix.mT, None, Rows(mixed, False)), None, order, starts)
    return product, mixed


def input_products_backward(
    of_product: torch.Tensor,
    of_mixed: torch.Tensor,
    addend: torch.Tensor | None,
    weight: torch.Tensor,
    matrix: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """Compute ``row_products.input_products_backward``."""
    gradient = of_mixed.new_empty(len(order), weight.shape[1])
    out = Rows(gradient, False)
    of_attention = Product(Rows(_dense(of_product), True), weight, None, out)
    of_dct = Product(Rows(_dense(of_mixed), False), matrix, None, out)
    _multiply(of_attention, of_dct, addend, order, starts)
    return gradient


def input_products_weights_backward(
    of_product: torch.Tensor, of_mixed: torch.Tensor, x: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``row_products.input_products_weights_backward``."""
    gradients = Rows(_dense(of_product), True), Rows(_dense(of_mixed), False)
    return _weight_gradients(gradients[0], Rows(_dense(x), False), gradients[1], order, starts)


def output_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """Compute ``row_products.output_product`` without gradient."""
    out = x.new_empty(len(x), len(weight))
    _multiply(Product(Rows(_dense(x), True), weight.mT, bias, Rows(out, False)), None, None, order, starts)
    return out


def output_product_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the rows, of the weight and of the bias of ``row_products.output_product``."""
    rows, of_x = Rows(_dense(gradient), False), x.new_empty(x.shape)
    _multiply(Product(rows, weight, None, Rows(of_x, True)), None, None, order, starts)
    of_weight, of_bias, _ = _weight_gradients(rows, Rows(_dense(x), True), None, order, starts)
    return of_x, of_weight, of_bias


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with its columns side by side in memory."""
    return x if x.stride(1) == 1 else x.contiguous()


def _multiply(
    attention: Product, dct: Product | None, addend: torch.Tensor | None, order: torch.Tensor, starts: torch.Tensor
) -> None:
    """Compute the products of both operators' rows, or of the attention rows alone.

    Args:
        attention, dct: the two products; the DCT rows are in the micro-batch's order before and after theirs.
        addend: (N, o) in the micro-batch's order, which is added to the results; None for nothing.
        order: (N,) int32, the operator order.
        starts: (B + 1,) int32, whose last number is that of the attention rows.
    """
    size, n = tiles(attention.rows.values.dtype), len(order)
    other = attention if dct is None else dct
    columns = max(attention.out.values.shape[1], other.out.values.shape[1])
    row_tiles = triton.cdiv(n, size.rows) + (dct is not None)
    dtype = attention.rows.values.dtype
    _products[triton.cdiv(columns, size.columns), row_tiles](
        attention.rows.values,
        attention.matrix,
        attention.matrix if attention.bias is None else attention.bias,
        attention.out.values,
        other.rows.values,
        other.matrix,
        other.out.values,
        order if addend is None else addend,
        order,
        starts,
        n,
        len(starts) - 1,
        *_strides(attention),
        *_strides(other),
        0 if addend is None else addend.stride(0),
        ATTENTION_GATHERED=not attention.rows.in_operator_order,
        ATTENTION_SCATTERED=not attention.out.in_operator_order,
        HAS_BIAS=attention.bias is not None,
        HAS_DCT=dct is not None,
        ADDED=addend is not None,
        **_constants(size, dtype),
    )


def _strides(product: Product) -> tuple[int, ...]:
    """Return the kernel's numbers for a product: i, o, the strides of rows and of results, those of the matrix."""
    inner, columns = product.matrix.shape
    return inner, columns, product.rows.values.stride(0), product.out.values.stride(0), *product.matrix.stride()


def _weight_gradients(
    gradient: Rows, x: Rows, of_dct: Rows | None, order: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the weight (o, i) and the bias (o,) of the attention rows, and of the matrix (d, i).

    Args:
        gradient: (N, o), of the attention rows' products.
        x: (N, i), the rows.
        of_dct: (N, d), the gradient of the DCT rows' products with the matrix; None for none, and d = 0.
        order: (N,) int32, the operator order.
        starts: (B + 1,) int32, whose last number is that of the attention rows.
    """
    size, n = tiles(x.values.dtype), len(order)
    o, i = gradient.values.shape[1], x.values.shape[1]
    d = 0 if of_dct is None else of_dct.values.shape[1]
    of_weight, of_bias, of_matrix = (x.values.new_empty(shape) for shape in ((o, i), (o,), (d, i)))
    tiles_of_weight = triton.cdiv(o, size.rows)
    other = gradient if of_dct is None else of_dct
    _weights[triton.cdiv(i, size.columns), tiles_of_weight + triton.cdiv(d, size.rows)](
        gradient.values,
        other.values,
        x.values,
        of_weight,
        of_bias,
        of_matrix,
        order,
        starts,
        n,
        len(starts) - 1,
        o,
        d,
        i,
        tiles_of_weight,
        gradient.values.stride(0),
        other.values.stride(0),
        x.values.stride(0),
        GRADIENT_GATHERED=not gradient.in_operator_order,
        X_GATHERED=not x.in_operator_order,
        **_constants(size, x.values.dtype),
    )
    return of_weight, of_bias, of_matrix


def _constants(size: Tiles, dtype: torch.dtype) -> dict:
    """Return the options that a kernel is compiled with."""
    return launch_options(size.warps, size.stages) | {
        "ROWS": size.rows,
        "COLUMNS": size.columns,
        "INNER": size.inner,
        "COMPUTE": compute_type(dtype),
        "PRECISION": product_precision(dtype),
    }


@jit
def _product_of_tile(
    x,
    matrix,
    bias,
    addend,
    out,
    order,
    first,
    end,
    first_column,
    inner,
    columns,
    x_row,
    out_row,
    matrix_inner,
    matrix_column,
    addend_row,
    GATHERED: tl.constexpr,
    SCATTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute ROWS by COLUMNS numbers of a product, of the rows from ``first`` to before ``end``."""
    row = first + tl.arange(0, ROWS)
    valid = row < end
    placed = row
    if GATHERED or SCATTERED:
        placed = tl.load(order + row, mask=valid, other=0)
    source = row
    if GATHERED:
        source = placed
    column = first_column + tl.arange(0, COLUMNS)
    wanted = column < columns
    at = source.to(tl.int64)[:, None] * x_row
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inner, INNER):
        number = start + tl.arange(0, INNER)
        known = number < inner
        left = tl.load(x + at + number[None, :], mask=valid[:, None] & known[None, :], other=0.0)
        right = matrix + number[:, None] * matrix_inner + column[None, :] * matrix_column
        right = tl.load(right, mask=known[:, None] & wanted[None, :], other=0.0)
        total = tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    mask = valid[:, None] & wanted[None, :]
    if ADDED:
        more = addend + placed.to(tl.int64)[:, None] * addend_row + column[None, :]
        total += tl.load(more, mask=mask, other=0.0).to(tl.float32)
    target = row
    if SCATTERED:
        target = placed
    to = out + target.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


def _products_kernel(
    x,
    matrix,
    bias,
    out,
    dct_x,
    dct_matrix,
    dct_out,
    addend,
    order,
    starts,
    n,
    sequences,
    inner,
    columns,
    x_row,
    out_row,
    matrix_inner,
    matrix_column,
    dct_inner,
    dct_columns,
    dct_x_row,
    dct_out_row,
    dct_matrix_inner,
    dct_matrix_column,
    addend_row,
    ATTENTION_GATHERED: tl.constexpr,
    ATTENTION_SCATTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DCT: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    count = tl.load(starts + sequences)
    tiles = tl.cdiv(count, ROWS)
    first_column = tl.program_id(0) * COLUMNS  # tiles of the same rows are neighbours, and share them in the cache
    tile = tl.program_id(1)
    if tile < tiles:
        if first_column < columns:
            _product_of_tile(
                x, matrix, bias, addend, out, order, tile * ROWS, count, first_column, inner, columns, x_row, out_row,
                matrix_inner, matrix_column, addend_row, ATTENTION_GATHERED, ATTENTION_SCATTERED, HAS_BIAS, ADDED, ROWS,
                COLUMNS, INNER, COMPUTE, PRECISION,
            )  # fmt: skip
    elif HAS_DCT:
        first = count + (tile - tiles) * ROWS
        if (first < n) & (first_column < dct_columns):
            _product_of_tile(
                dct_x, dct_matrix, bias, addend, dct_out, order, first, n, first_column, dct_inner, dct_columns,
                dct_x_row, dct_out_row, dct_matrix_inner, dct_matrix_column, addend_row, True, True, False, ADDED, ROWS,
                COLUMNS, INNER, COMPUTE, PRECISION,
            )  # fmt: skip


@jit
def _weights_of_tile(
    gradient,
    x,
    out,
    bias_out,
    order,
    first,
    end,
    first_output,
    first_input,
    outputs,
    inputs,
    gradient_row,
    x_row,
    GRADIENT_GATHERED: tl.constexpr,
    X_GATHERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum ROWS by COLUMNS numbers of a weight's gradient over the rows from ``first`` to before ``end``."""
    output = first_output + tl.arange(0, ROWS)
    column = first_input + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    level = tl.zeros((ROWS,), tl.float32)
    for start in range(first, end, INNER):
        row = start + tl.arange(0, INNER)
        valid = row < end
        placed = row
        if GRADIENT_GATHERED or X_GATHERED:
            placed = tl.load(order + row, mask=valid, other=0)
        of_gradient, of_x = row, row
        if GRADIENT_GATHERED:
            of_gradient = placed
        if X_GATHERED:
            of_x = placed
        left = gradient + of_gradient.to(tl.int64)[None, :] * gradient_row + output[:, None]
        left = tl.load(left, mask=valid[None, :] & (output < outputs)[:, None], other=0.0)  # (ROWS, INNER)
        right = x + of_x.to(tl.int64)[:, None] * x_row + column[None, :]
        right = tl.load(right, mask=valid[:, None] & (column < inputs)[None, :], other=0.0)
        total = tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision=PRECISION)
        if HAS_BIAS:
            level += tl.sum(left.to(tl.float32), 1)
    mask = (output < outputs)[:, None] & (column < inputs)[None, :]
    to = out + output.to(tl.int64)[:, None] * inputs + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)
    if HAS_BIAS:  # noqa: SIM102 (this is decided when the kernel is compiled, the rest when it runs)
        if first_input == 0:
            tl.store(bias_out + output, level.to(bias_out.dtype.element_ty), mask=output < outputs)


def _weights_kernel(
    gradient,
    of_dct,
    x,
    of_weight,
    of_bias,
    of_matrix,
    order,
    starts,
    n,
    sequences,
    outputs,
    dct_outputs,
    inputs,
    tiles_of_weight,
    gradient_row,
    dct_row,
    x_row,
    GRADIENT_GATHERED: tl.constexpr,
    X_GATHERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    count = tl.load(starts + sequences)
    first_input = tl.program_id(0) * COLUMNS
    tile = tl.program_id(1)
    if tile < tiles_of_weight:
        _weights_of_tile(
            gradient, x, of_weight, of_bias, order, 0, count, tile * ROWS, first_input, outputs, inputs, gradient_row,
            x_row, GRADIENT_GATHERED, X_GATHERED, True, ROWS, COLUMNS, INNER, COMPUTE, PRECISION,
        )  # fmt: skip
    else:
        first_output = (tile - tiles_of_weight) * ROWS
        _weights_of_tile(
            of_dct, x, of_matrix, of_bias, order, count, n, first_output, first_input, dct_outputs, inputs, dct_row,
            x_row, True, True, False, ROWS, COLUMNS, INNER, COMPUTE, PRECISION,
        )  # fmt: skip


_products = jit(_products_kernel)
_weights = jit(_weights_kernel)
