"""Both operators of a routed layer for the rows of a partition, up to the output product and the norms.

    x --input products--> queries of attention rows | M x of DCT rows           x --product--> keys, values of all rows
    queries, keys --RoPE--> --attention--> results of attention rows, in operator order

All tensors have N rows whatever the routes are. Rows of the other operator are never written, and nobody reads them.

Shapes: N = rows, d = channels, h = heads, c = channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megachiar.kernels.partition import Partition
from megachiar.kernels.partitioned_attention import attend, attend_backward
from megachiar.kernels.rope import rotate_by_partition
from megachiar.kernels.row_products import (
    input_products,
    input_products_backward,
    input_products_weights_backward,
)

Tensor = torch.Tensor


class AttentionRows(NamedTuple):
    """What attention knows of the rows besides their route, each in the rows' first order.

    Attributes:
        document_firsts: (N,) int32, the first row of each row's document; None where each sequence is one document.
        document_ends: (N,) int32, the row behind the last one of each row's document; None as ``document_firsts``.
        dropout_keys: (N,) int64, the dropout keys of the rows; None for no dropout.
    """

    document_firsts: Tensor | None = None
    document_ends: Tensor | None = None
    dropout_keys: Tensor | None = None


class AttentionForm(NamedTuple):
    """The numbers of an attention sub-layer.

    Attributes:
        heads: h.
        head_size: c.
        length: tokens of a sequence.
        longest: the number of positions of the table of angles.
        rope_base: the base of the angles.
        dropout: probability of dropout of attention's probabilities.
        site: number of the sub-layer in the model, for dropout.
    """

    heads: int
    head_size: int
    length: int
    longest: int
    rope_base: float
    dropout: float
    site: int


class Linear(NamedTuple):
    """The weight (o, d) and bias (o,) of a linear layer."""

    weight: Tensor
    bias: Tensor


def mix_by_partition(
    x: Tensor,
    keys_from: Tensor | None,
    query: Linear,
    key_value: Linear,
    matrix: Tensor,
    by: Partition,
    rows: AttentionRows,
    form: AttentionForm,
    keys_are_routed: bool,
) -> tuple[Tensor, Tensor]:
    """Compute attention of the attention rows and DCT mixing of the others, with gradients.

    Args:
        x: (N, d), the rows that queries and DCT mixing are made of.
        keys_from: (N, d), the rows that keys and values are made of; None if that is ``x``.
        query, key_value: linear layers with h * c and 2 * h * c outputs.
        matrix: (d, d), symmetric: DCT mixing as a product.
        by: which rows take which operator.
        rows: documents and dropout keys of the rows.
        form: the numbers of attention.
        keys_are_routed: whether attention rows see attention rows alone.

    Returns:
        Results of attention (N, h * c) in operator order, of which the attention rows are written, and of DCT mixing
        (N, d) in the rows' order, of which the DCT rows are written.
    """
    other: Linear | None = key_value
    if keys_are_routed:  # one product makes all three
        query = Linear(*(torch.cat(parts) for parts in zip(query, key_value, strict=True)))
        other = None
    weights = *query, *(other or (None, None))
    return _Mix.apply(x, keys_from, *weights, matrix, *by, *rows, *form)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        keys_from,
        weight,
        bias,
        kv_weight,
        kv_bias,
        matrix,
        routes,
        order,
        before,
        starts,
        document_firsts,
        document_ends,
        dropout_keys,
        h,
        c,
        length,
        longest,
        rope_base,
        dropout,
        site,
    ):
        product, mixed = input_products(x, weight, bias, matrix, order, starts)
        heads = product.view(len(x), -1, h, c)  # queries, and with routed keys also keys and values
        kv = None
        if kv_weight is not None:
            kv = torch.addmm(kv_bias, x if keys_from is None else keys_from, kv_weight.mT).view(-1, 2, h, c)
        rotate_by_partition(heads, kv, order, starts, length, longest, rope_base, back=False)
        known = document_firsts, document_ends, dropout_keys
        output, sums = attend(heads, kv, routes, order, before, starts, *known, dropout, site)
        attended = output.flatten(1)
        ctx.save_for_backward(
            x, keys_from, weight, kv_weight, matrix, heads, kv, attended, sums, routes, order, before, starts, *known
        )
        ctx.numbers = length, longest, rope_base, dropout, site
        return attended, mixed

    @staticmethod
    def backward(ctx, of_attended, of_mixed):
        x, keys_from, weight, kv_weight, matrix, heads, kv, attended, sums, *of_rows = ctx.saved_tensors
        routes, order, before, starts, firsts, ends, keys = of_rows
        length, longest, rope_base, dropout, site = ctx.numbers
        gradient, output = (y.view(len(heads), *heads.shape[2:]) for y in (of_attended, attended))
        gradients = attend_backward(
            gradient, output, sums, heads, kv, routes, order, before, starts, firsts, ends, keys, dropout, site
        )
        of_heads, of_kv = gradients if len(gradients) == 2 else (gradients[0], None)
        rotate_by_partition(of_heads, of_kv, order, starts, length, longest, rope_base, back=True)
        of_product, addend = of_heads.flatten(1), None
        of_keys_from = of_kv_weight = of_kv_bias = None
        if of_kv is not None:
            of_kv = of_kv.flatten(1)
            of_source = of_kv @ kv_weight
            of_kv_weight, of_kv_bias = of_kv.mT @ (x if keys_from is None else keys_from), of_kv.sum(0)
            addend, of_keys_from = (of_source, None) if keys_from is None else (None, of_source)
        of_x = input_products_backward(of_product, of_mixed, addend, weight, matrix, order, starts)
        of_weight, of_bias, of_matrix = input_products_weights_backward(of_product, of_mixed, x, order, starts)
        of_weights = of_weight, of_bias, of_kv_weight, of_kv_bias, of_matrix
        return of_x, of_keys_from, *of_weights, *[None] * 14
