"""Products of the rows of each operator, whose number stands on the device alone.

    input_products     x --rows of attention--> x W^T + b, in operator order
                         --rows of DCT mixing--> x M^T, in the place of each row
    output_product     attention's results, in operator order --> y W^T + b, in the place of each row

Rows that an operator has nothing to do with are not written: they are whatever was there (NaN on a CPU), in a gradient
too. They are never multiplied, and no sum reads them.

Shapes: N = rows, i = inputs, o = outputs, d = channels. A partition says which rows are whose (see ``partition``).
"""

from __future__ import annotations

import torch

from megachiar.kernels import gpu, triton_row_products
from megachiar.kernels.operation import operation

Tensor = torch.Tensor


@operation("megachiar::input_products")
def input_products(
    x: Tensor, weight: Tensor, bias: Tensor, matrix: Tensor, order: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the first product of each operator for its own rows.

    Args:
        x: (N, d).
        weight, bias: (o, d) and (o,), of the attention rows.
        matrix: (d, d), of the DCT rows.
        order: (N,) int32, the operator order.
        starts: (B + 1,) int32, whose last number is that of the attention rows.

    Returns:
        (N, o) in operator order, of which the attention rows are written, and (N, d) in the order of ``x``, of which
        the DCT rows are written.
    """
    if _by_triton(x):
        return triton_row_products.input_products(x, weight, bias, matrix, order, starts)
    leads, by_order = _leads(order, starts), x.index_select(0, order)
    product = _only(leads, torch.addmm(bias, by_order, weight.mT))
    return product, _in_place(_only(~leads, by_order @ matrix.mT), order)


@input_products.register_fake
def _(x, weight, bias, matrix, order, starts):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(matrix))


@operation("megachiar::input_products_backward")
def input_products_backward(
    of_product: Tensor,
    of_mixed: Tensor,
    addend: Tensor | None,
    weight: Tensor,
    matrix: Tensor,
    order: Tensor,
    starts: Tensor,
) -> Tensor:
    """Return the gradient (N, d) of the rows ``x`` of ``input_products``, all of them written.

    Args:
        of_product: (N, o), the gradient of the first result; its rows behind the attention rows are not read.
        of_mixed: (N, d), the gradient of the second result; its attention rows are not read.
        addend: (N, d), what is added to it; None for nothing.
        weight, matrix, order, starts: as in ``input_products``.
    """
    if _by_triton(of_mixed):
        return triton_row_products.input_products_backward(of_product, of_mixed, addend, weight, matrix, order, starts)
    leads = _leads(order, starts)
    of_attention = _only(leads, of_product, 0) @ weight
    of_dct = _only(~leads, of_mixed.index_select(0, order), 0) @ matrix
    gradient = _in_place(torch.where(leads[:, None], of_attention, of_dct), order)
    return gradient if addend is None else gradient + addend


@input_products_backward.register_fake
def _(of_product, of_mixed, addend, weight, matrix, order, starts):
    return of_mixed.new_empty(len(of_mixed), len(matrix))


@operation("megachiar::input_products_weights_backward")
def input_products_weights_backward(
    of_product: Tensor, of_mixed: Tensor, x: Tensor, order: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``weight`` (o, d), ``bias`` (o,) and ``matrix`` (d, d) of ``input_products``.

    They are zeros where an operator has no rows. The arguments are those of ``input_products_backward``.
    """
    if _by_triton(x):
        return triton_row_products.input_products_weights_backward(of_product, of_mixed, x, order, starts)
    leads, by_order = _leads(order, starts), x.index_select(0, order)
    of_product = _only(leads, of_product, 0)
    of_mixed = _only(~leads, of_mixed.index_select(0, order), 0)
    return of_product.mT @ by_order, of_product.sum(0), of_mixed.mT @ by_order


@input_products_weights_backward.register_fake
def _(of_product, of_mixed, x, order, starts):
    o, d = of_product.shape[1], x.shape[1]
    return x.new_empty(o, d), x.new_empty(o), x.new_empty(of_mixed.shape[1], d)


@operation("megachiar::output_product")
def _output_product(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    if _by_triton(x):
        return triton_row_products.output_product(x, weight, bias, order, starts)
    return _in_place(_only(_leads(order, starts), torch.addmm(bias, x, weight.mT)), order)


@_output_product.register_fake
def _(x, weight, bias, order, starts):
    return x.new_empty(len(x), len(weight))


@operation("megachiar::output_product_backward")
def _output_product_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, order: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the rows (N, i), of which the attention rows are written, of weight and of bias."""
    if _by_triton(x):
        return triton_row_products.output_product_backward(gradient, x, weight, order, starts)
    leads = _leads(order, starts)
    gradient = _only(leads, gradient.index_select(0, order), 0)
    return _only(leads, gradient @ weight), gradient.mT @ _only(leads, x, 0), gradient.sum(0)


@_output_product_backward.register_fake
def _(gradient, x, weight, order, starts):
    return x.new_empty(x.shape), x.new_empty(weight.shape), x.new_empty(len(weight))


class _OutputProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, order, starts):
        ctx.save_for_backward(x, weight, order, starts)
        return _output_product(x, weight, bias, order, starts)

    @staticmethod
    def backward(ctx, gradient):
        return *_output_product_backward(gradient, *ctx.saved_tensors), None, None


def output_product(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Compute the output product of attention, with gradients.

    Args:
        x: (N, i) in operator order, of which the attention rows are read.
        weight, bias: (o, i) and (o,).
        order, starts: as in ``input_products``.

    Returns:
        (N, o) in the rows' first order, of which the attention rows are written.
    """
    return _OutputProduct.apply(x, weight, bias, order, starts)


def _by_triton(x: Tensor) -> bool:
    return gpu.has_kernels(x.device) and triton_row_products.supports(x)


def _leads(order: Tensor, starts: Tensor) -> Tensor:
    """Return which indices (N,) of the operator order are those of attention rows."""
    return torch.arange(len(order), device=order.device) < starts[-1:]


def _only(known: Tensor, rows: Tensor, other: float = torch.nan) -> Tensor:
    """Return ``rows`` (N, ...), with ``other`` in place of those that are not ``known`` (N,)."""
    return torch.where(known.view(-1, *[1] * (rows.dim() - 1)), rows, other)


def _in_place(by_order: Tensor, order: Tensor) -> Tensor:
    """Return rows (N, d) in their first order, from those in operator order."""
    return torch.empty_like(by_order).index_copy_(0, order.long(), by_order)
