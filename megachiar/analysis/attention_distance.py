"""Measure how far back the attention of a model looks from each token: the mean distance of the keys by their weight.

    distance(i) = sum over j <= i of a(i, j) * (i - j)        a = softmax of a head's scores, in tokens

Shapes: A = attention layers, B = sequences of a batch, S = all sequences, T = tokens, h = heads, c = channels of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from megachiar.analysis.routed_tokens import batches
from megachiar.analysis.windows import Windows
from megachiar.model import ChiarFormer
from megachiar.model.attention import SelfAttention
from megachiar.model.batch_layout import BatchLayout

QUERIES = 256
"""Queries whose weights exist at once, for one sequence after another: memory stays small at long T."""


def attention_distances(
    model: ChiarFormer,
    windows: Windows,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Return the mean distance (A, S, T) fp64 of each query in each attention layer, the mean over the heads.

    Args:
        model: in evaluation mode, a baseline: all tokens attend in every layer.
        windows: S windows of T tokens.
        batch_size: sequences of a forward pass.
        advance: is told of sequences that have been run.
    """
    found = []
    for batch in batches(model, windows, batch_size):
        of_batch: list[torch.Tensor] = []
        modules = [module for module in model.modules() if isinstance(module, SelfAttention)]
        hooks = [module.register_forward_pre_hook(partial(_watch, of_batch)) for module in modules]
        try:
            with torch.inference_mode():
                model(*batch)
        finally:
            for hook in hooks:
                hook.remove()
        found.append(torch.stack(of_batch).double().cpu().numpy())
        advance(len(batch[0]))
    return np.concatenate(found, 1)


def _watch(found: list[torch.Tensor], module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Add the distances (B, T) of an attention sub-layer that is about to run."""
    assert isinstance(module, SelfAttention)
    layout: BatchLayout = arguments[3]
    q, k = module.queries_and_keys(arguments[0], layout)
    starts = layout.document_starts
    found.append(torch.stack([mean_distance(q[b], k[b], None if starts is None else starts[b]) for b in range(len(q))]))


def mean_distance(q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean distance (T,) of the keys that each query attends to, averaged over heads, in tokens.

    Args:
        q, k: (h, T, c), rotated queries and keys of a sequence.
        starts: (T,) first position of each token's document; None where attention crosses documents.
    """
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    if q.dtype != torch.float64:
        q, k = q.float(), k.float()
    place = torch.arange(length, device=q.device)
    parts = []
    for first in range(0, length, QUERIES):
        query = place[first : first + QUERIES]
        hidden = place > query[:, None]
        if starts is not None:
            hidden = hidden | (place < starts[query][:, None])
        scores = (q[:, query] @ k.mT * scale).masked_fill(hidden, -torch.inf)
        distance = (query[:, None] - place).to(scores.dtype)
        parts.append((scores.softmax(-1) * distance).sum(-1).mean(0))
    return torch.cat(parts)
