"""The matrices of a model that map hidden states to hidden states: those that Muon trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from megachiar.model.attention import SelfAttention
from megachiar.model.feed_forward import FeedForward
from megachiar.model.rbf_mixing import RbfMixing
from megachiar.parallel.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear

_SUB_LAYERS = (SelfAttention, FeedForward, RbfMixing)
_LINEAR = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)


@dataclass(frozen=True)
class HiddenMatrix:
    """A parameter that holds one or several matrices below each other.

    Attributes:
        parameter: (o, i), or this tensor-parallel rank's part of it.
        blocks: number of equal blocks of outputs that are matrices of their own: 2 for keys and values, else 1.
    """

    parameter: nn.Parameter
    blocks: int


def hidden_matrices(module: nn.Module) -> list[HiddenMatrix]:
    """Return the matrices of attention (query, key, value, output), feed-forward and RBF mixing below ``module``.

    Muon bounds how far a step can move a layer's outputs, for inputs that are dense vectors. That holds where hidden
    states go in and come out. An embedding takes one row at a time, and a head or a router makes scores: their matrices
    are left to AdamW, as are all vectors.
    """
    sub_layers = [found for found in module.modules() if isinstance(found, _SUB_LAYERS)]
    children = [child for sub_layer in sub_layers for child in sub_layer.children()]
    return [HiddenMatrix(child.weight, getattr(child, "blocks", 1)) for child in children if isinstance(child, _LINEAR)]
