"""What a run is asked beside its validation sets: tasks and prompts, as the trainer sees them.

``megachiar.evaluation`` stands above the training, and gives it to the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from megachiar.config import RunConfig
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.engine.engine import Engine
from megachiar.training.samples_file import Sample

SAMPLES = "samples"
"""The name of the continuations of prompts among what is evaluated."""


class Asked(Protocol):
    """Tasks and prompts; every rank calls each method.

    Attributes:
        names: of what can be measured: ``eval/TASK`` for each task, and ``samples`` where there are prompts.
        maximised: the names ``eval/TASK/METRIC`` of measures of which the highest is the best.
        minimised: those of which the lowest is. Of a measure with neither nobody says which is better.
    """

    names: Sequence[str]
    maximised: Collection[str]
    minimised: Collection[str]

    def measure(self, name: str, before_batch: Callable[[int], None]) -> Mapping[str, float]:
        """Return what a task measures, by metric.

        Args:
            name: ``eval/TASK``.
            before_batch: is called on all ranks before the same batches, with the number of texts that are done. What
                it raises breaks the evaluation off.
        """
        ...

    def continue_prompts(self, step: int) -> list[Sample]:
        """Return how the run continues the prompts after ``step``; rank 0 has them, and the others an empty list."""
        ...


class NothingAsked:
    """The tasks and prompts of a run that has none."""

    names: Sequence[str] = ()
    maximised: Collection[str] = ()
    minimised: Collection[str] = ()

    def measure(self, name: str, before_batch: Callable[[int], None]) -> Mapping[str, float]:
        """Raise: there is nothing to measure."""
        raise KeyError(name)

    def continue_prompts(self, step: int) -> list[Sample]:
        """Return no samples."""
        return []


MakeAsked = Callable[[RunConfig, Engine, Tokenizer | None], Asked]
"""Makes the tasks and prompts of a run from its config, its engine and the tokenizer of its data, on every rank."""


def nothing_asked(config: RunConfig, engine: Engine, tokenizer: Tokenizer | None) -> Asked:
    """Return the tasks and prompts of a run that has none."""
    return NothingAsked()
