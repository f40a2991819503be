"""Count how often each class was predicted for each label, on the device."""

from __future__ import annotations

import torch

from megachiar.kernels.ignored_target import IGNORED_TARGET


def confusion_matrix(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> torch.Tensor:
    """Return how often each class was predicted for each label, (C, C) int64 by label and predicted class.

    Args:
        labels: (n,) int64; -100 marks a sequence that does not count.
        predicted: (n,) int64.
        classes: C.
    """
    is_labelled = labels != IGNORED_TARGET
    cells = torch.where(is_labelled, labels * classes + predicted, 0)
    return labels.new_zeros(classes * classes).index_add_(0, cells, is_labelled.long()).view(classes, classes)
