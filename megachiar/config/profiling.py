"""The section ``profiling:`` of a run's YAML file, and the check of its keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from megachiar.config.errors import Problem
from megachiar.config.model import ModelConfig
from megachiar.config.run_length import steps_of_tokens
from megachiar.config.section import Section
from megachiar.config.sections import DataConfig, TrainingConfig, sample_length


class ProfilingConfig(Section):
    steps: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] | None = None
    """First and last step that PyTorch's profiler records, such as [50, 55]; null: none. The steps before them warm up.
    A step takes longer while it is recorded."""
    ranks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    """Numbers of the ranks that record."""
    memory: bool = False
    """Record each allocation as well. On a GPU a memory snapshot is written beside the trace."""


def profiling(
    model: ModelConfig, data: DataConfig, training: TrainingConfig, profiling: ProfilingConfig
) -> Iterator[Problem]:
    """Check that the steps to record are in order and within the run; one of epochs is checked where its data is."""
    if profiling.steps is None:
        return
    first, last = profiling.steps
    steps = training.steps
    if steps is None and training.tokens is not None:
        steps = steps_of_tokens(training.tokens, training.global_batch_size, sample_length(model, data))
    if last < first:
        yield Problem("profiling.steps", f"is [{first}, {last}]: the last step is before the first", "swap them")
    elif steps is not None and (problem := outside(last, steps)) is not None:
        yield Problem("profiling.steps", *problem)


def outside(last: int, steps: int) -> tuple[str, str] | None:
    """Return problem and remedy where the last step to record is not in a run of so many steps; None where it is."""
    if last <= steps:
        return None
    return f"ends at step {last:,}, but the run has {steps:,} steps", f"name steps up to {steps}, or set it to null"
