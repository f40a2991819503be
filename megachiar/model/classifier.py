"""Classification heads: the class of a sequence, from the mean of its final hidden states.

Shapes: B = sequences, T = tokens of a sequence, N = B * T rows, m = this rank's rows (N, or N / p with sequence
parallelism), d = channels, C = classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.config.tasks import HeadConfig
from megachiar.kernels.dropout import apply_dropout
from megachiar.kernels.ignored_target import IGNORED_TARGET
from megachiar.model.batch_layout import BatchLayout, dropout_of
from megachiar.parallel.collectives import reduce_from_tp_group


class ClassifierLoss(NamedTuple):
    """The loss of a batch of labelled sequences.

    Attributes:
        loss: mean cross-entropy in nats of the sequences that have a label, fp32; 0 where none has.
        sequence_losses: (B,) fp32 without gradient, 0 where there is no label.
    """

    loss: torch.Tensor
    sequence_losses: torch.Tensor


class ClassificationHead(nn.Module):
    """Logits of C classes for pooled hidden states. Every rank of a tensor-parallel group computes all of them.

    Its layers are whole and get the same inputs and gradients on every rank, so that no gradient is reduced.
    """

    def __init__(self, config: ModelConfig, head: HeadConfig):
        super().__init__()
        d = config.hidden_size
        self.config = head
        self.dropout = config.dropout
        self.layer = config.num_layers  # in the keys of dropout, after those of the layers
        if head.kind == "mlp":
            self.hidden = nn.Linear(d, d)
        self.output = nn.Linear(d, head.classes)

    def forward(self, pooled: torch.Tensor, layout: BatchLayout | None = None) -> torch.Tensor:
        """Compute logits (B, C) of pooled hidden states (B, d); ``layout`` has the keys of dropout in training."""
        if self.config.kind == "linear":
            return self.output(pooled)
        x = F.gelu(self.hidden(pooled))
        keys = layout.dropout_keys if layout is not None else None
        if self.training and self.dropout and layout is not None and keys is not None:
            of_sequences = keys.all_rows.view(layout.sequences, -1)[:, 0].contiguous()
            x = apply_dropout(x, dropout_of(self.dropout, of_sequences, self.layer, 0))
        return self.output(x)


def build_heads(config: ModelConfig, heads: Mapping[str, HeadConfig]) -> nn.ModuleDict:
    """Build the heads of a model by the name of their task."""
    return nn.ModuleDict({name: ClassificationHead(config, head) for name, head in heads.items()})


def real_lengths(tokens: torch.Tensor, head: HeadConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return tokens (B, T) that can be embedded, and how many of each sequence count.

    Args:
        tokens: (B, T) int64, filled up with -1.
        head: of the task.

    Returns:
        (B, T) int64 with 0 for padding; and (B,) int64, at least 1, or None where padding counts.
    """
    lengths = (tokens >= 0).sum(1).clamp_min(1) if head.padding == "masked" else None
    return tokens.clamp_min(0), lengths


def pool(x: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """Return the means (B, d) of the hidden states ``x`` (m, d) over the real tokens of each sequence.

    They are summed in fp32 or wider, and the same on all ranks of a tensor-parallel group.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if layout.lengths is not None:
        sequence = layout.local_sequences(x.device)
        is_real = layout.local_positions(x.device) < layout.lengths.index_select(0, sequence)
        wide = wide * is_real[:, None]
    if not layout.group.shards_rows:
        sums = wide.view(layout.sequences, layout.length, -1).sum(1)
    else:
        sums = reduce_from_tp_group(_local_sums(wide, layout), layout.group)
    counts = layout.length if layout.lengths is None else layout.lengths[:, None]
    return (sums / counts).to(x.dtype)


def _local_sums(x: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """Return the sums (B, d) of this rank's rows ``x`` (m, d) of each sequence, zeros where it has none."""
    local = layout.local_slice
    sums = []
    for sequence in range(layout.sequences):
        start = max(sequence * layout.length, local.start) - local.start
        stop = min((sequence + 1) * layout.length, local.stop) - local.start
        sums.append(x[start : max(start, stop)].sum(0))
    return torch.stack(sums)


def classifier_loss(logits: torch.Tensor, labels: torch.Tensor) -> ClassifierLoss:
    """Return the losses of logits (B, C) against labels (B,) int64, -100 where a sequence has none."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide, labels, ignore_index=IGNORED_TARGET, reduction="none")
    count = (labels != IGNORED_TARGET).sum().clamp_min(1)
    return ClassifierLoss(losses.sum() / count, losses.detach())


def touch_unused(heads: nn.ModuleDict, used: str | None, x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` unchanged, with a gradient of zero for every head that this micro-batch does not use.

    So every parameter has a gradient in every step and in every layout: AdamW steps them all alike.
    """
    for name, head in heads.items():
        if name != used:
            x = x + 0 * head(x.new_zeros(1, x.shape[-1])).sum()
    return x
