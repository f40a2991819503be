"""The micro-batches of a step: of the main task, and in mixed training of other tasks too.

Shapes: B = sequences of a micro-batch, T = tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megachiar.config.tasks import RunTask
from megachiar.engine.host_copies import to_device

_TASK_BITS = 48


class MicroStep(NamedTuple):
    """What one micro-batch of a step is for.

    Attributes:
        task: number of its task, 0 for the main one.
        weight: factor of its loss beside that of a micro-batch of the main task.
    """

    task: int = 0
    weight: float = 1.0


class MicroBatch(NamedTuple):
    """A micro-batch on the device.

    Attributes:
        inputs: (B, T) int64; padded with -1 where the task is a classification.
        targets: (B, T) int64, the next tokens; or (B,) int64, the labels.
        sample_ids: (B,) int64, unique over the tasks of the run.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    sample_ids: torch.Tensor


def main_steps(count: int) -> list[MicroStep]:
    """Return the plan of a step with ``count`` micro-batches of the main task alone."""
    return [MicroStep()] * count


def on_device(
    batches: Iterable[tuple[int, np.ndarray]],
    plan: Sequence[MicroStep],
    tasks: Sequence[RunTask],
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a step on the device, by one copy each: the device counts the sample ids itself.

    Args:
        batches: number of the first sample, within its task, and samples of each micro-batch in the order of the plan:
            (B, T + 1) int64, tokens; or in a classification T tokens padded with -1, and the label.
        plan: of the step.
        tasks: of the run.
        device: of this rank.
    """
    for micro_step, (first_sample, batch) in zip(plan, batches, strict=True):
        samples = to_device(batch, device)
        first = first_sample + (micro_step.task << _TASK_BITS)
        sample_ids = torch.arange(first, first + len(batch), device=device)
        is_labelled = tasks[micro_step.task].head is not None
        yield MicroBatch(samples[:, :-1], samples[:, -1] if is_labelled else samples[:, 1:], sample_ids)
