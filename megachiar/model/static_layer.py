"""The operators of a routed layer with shapes that do not depend on the routes, so that the host waits for nothing.

    x --H--> scores --partition--> which rows are whose, on the device
    x --mix_by_partition--> attention of its rows | DCT mixing of the others --output product--> --norm by operator--> y

Every tensor has N rows. The results are those of ``RoutedLayer``'s own way to rounding, which the tests hold, and the
kernels are fewer. It serves two operators on one tensor-parallel rank in training; ``layer.RoutedLayer`` says when.

Shapes: N = rows of the micro-batch, d = channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megachiar.kernels.partition import Partition, partition
from megachiar.kernels.partitioned_mixing import AttentionForm, AttentionRows, Linear, mix_by_partition
from megachiar.kernels.routed_norm import NormParameters, add_and_norm_by_route, add_by_route
from megachiar.kernels.row_products import output_product
from megachiar.kernels.spectral import filter_matrices
from megachiar.model.attention import SelfAttention
from megachiar.model.batch_layout import BatchLayout, dropout_site
from megachiar.model.dct_mixing import DctMixing
from megachiar.model.router import RoutingDecision


class PartitionStatistics(NamedTuple):
    """What a layer of static shapes has measured, before it is reduced together with that of the other layers.

    Attributes:
        attention_rows: (1,) int32, how many there are.
        entropy: (N,) spectral entropy H.
    """

    attention_rows: torch.Tensor
    entropy: torch.Tensor


def partition_rows(
    decision: RoutingDecision, threshold: torch.Tensor, layout: BatchLayout, routes: torch.Tensor | None
) -> Partition:
    """Send each row to its operator.

    Args:
        decision: has the scores.
        threshold: (1,), what they are compared with.
        layout: the layout of the micro-batch.
        routes: (N,) int64, routes to take instead of deciding; None to decide.
    """
    if routes is not None:
        return partition(routes, None, layout.sequences)
    assert decision.score is not None, "routers that decide by gates have no static shapes"
    return partition(decision.score, threshold, layout.sequences)


def mix_statically(
    attention: SelfAttention,
    dct: DctMixing,
    x: torch.Tensor,
    by: Partition,
    layout: BatchLayout,
    matrix: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the operators' sub-layer, residual and norm included, for all rows (N, d).

    Args:
        attention, dct: the operators.
        x: hidden states (N, d).
        by: which rows take which operator.
        layout: the layout of the micro-batch.
        matrix: (d, d), the filter of ``dct`` as a matrix; None to make it here.
    """
    if matrix is None:
        matrix = filter_matrices(dct.filter, dct.gain)
    norms = NormParameters(*attention.norm.replicated_parameters()), NormParameters(*dct.norm.replicated_parameters())
    taken, keys_from = x, None
    if attention.pre:
        taken = add_and_norm_by_route(x, None, by.routes, *norms, attention.norm.eps)
        if not attention.keys_are_routed:
            keys_from = attention.norm(x)
    attended, mixed = mix_by_partition(
        taken,
        keys_from,
        Linear(attention.query.weight, attention.query.bias),
        Linear(attention.key_value.weight, attention.key_value.bias),
        matrix,
        by,
        _attention_rows(attention, layout),
        _form(attention, layout),
        attention.keys_are_routed,
    )
    projected = output_product(attended, attention.output.weight, attention.output.bias, by.order, by.starts)
    if attention.pre:
        return add_by_route(x, (projected, mixed), by.routes)
    return add_and_norm_by_route(x, (projected, mixed), by.routes, *norms, attention.norm.eps)


def _attention_rows(attention: SelfAttention, layout: BatchLayout) -> AttentionRows:
    """Return documents and dropout keys of the rows."""
    documents, keys = layout.with_document_rows().document_rows, layout.dropout_keys
    drops = attention.training and attention.dropout > 0 and keys is not None
    return AttentionRows(
        document_firsts=documents.firsts if documents is not None else None,
        document_ends=documents.ends if documents is not None else None,
        dropout_keys=keys.all_rows if drops and keys is not None else None,
    )


def _form(attention: SelfAttention, layout: BatchLayout) -> AttentionForm:
    """Return the numbers of an attention sub-layer."""
    return AttentionForm(
        heads=attention.heads,
        head_size=attention.head_size,
        length=layout.length,
        longest=max(attention.longest, layout.length),
        rope_base=attention.rope_base,
        dropout=attention.dropout,
        site=dropout_site(attention.layer, 0),
    )
