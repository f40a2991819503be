"""Open the data of the auxiliary tasks of mixed training.

A task reads its dataset in an order of its own, keyed by the run's seed and the number of the task. How far it has read
follows from the draws (``mixing.py``) since the run started. Checkpoints record it, since the draws may change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megachiar.config import RunConfig
from megachiar.config.tasks import AuxiliaryTaskConfig
from megachiar.data.sampling.dataset import SampleStream, TokenSource, ValidationSet
from megachiar.data.sampling.examples import (
    SAMPLE_LENGTH,
    ExampleSet,
    ExampleStream,
    LabelledSource,
    open_example_set,
)
from megachiar.data.sampling.order import OrderedSource, RunOrder
from megachiar.data.storage.files import bin_path

_FIRST_NUMBER = 1 << 20
"""Added to a task's number in the keys of its order: no source of ``data.train`` has such a number."""


class TasksRead(NamedTuple):
    """How far the auxiliary tasks had read their data where a run started or went on.

    Attributes:
        position: samples of the main task that were read up to there.
        samples: samples of each auxiliary task, in the order of the config; none for a new run.
    """

    position: int = 0
    samples: tuple[int, ...] = ()


NOTHING_READ = TasksRead()


@dataclass(frozen=True)
class AuxiliaryTask:
    """An auxiliary task of a run.

    Attributes:
        name: of the task.
        training: its training samples by position among those that the task has drawn.
        validation: its validation set; None without one.
        test: its test set; None without one.
    """

    name: str
    training: SampleStream
    validation: ValidationSet | ExampleSet | None
    test: ValidationSet | ExampleSet | None

    @property
    def source(self) -> TokenSource:
        """The dataset that the task trains on."""
        return self.training.sources[0]


def open_auxiliary_tasks(config: RunConfig) -> tuple[AuxiliaryTask, ...]:
    """Open the datasets of the auxiliary tasks.

    Raises:
        UserError: a dataset is missing, damaged or too short, or has other classes than the config says.
    """
    return tuple(
        _open_task(config, name, task, number) for number, (name, task) in enumerate(config.mixed.tasks.items(), 1)
    )


def _open_task(config: RunConfig, name: str, task: AuxiliaryTaskConfig, number: int) -> AuxiliaryTask:
    vocab_size, length, head = config.model.vocab_size, config.sequence_length, task.head_config
    seed = config.training.seed
    prefixes = (task.validation, task.test)
    if head is None:
        source = TokenSource(task.data, vocab_size, random_access=True)
        training = SampleStream([source], _order(source, length, seed, number))
        texts = [ValidationSet(prefix, length, vocab_size=vocab_size) if prefix else None for prefix in prefixes]
        return AuxiliaryTask(name, training, *texts)
    labelled = LabelledSource(task.data, head.classes, vocab_size, random_access=True)
    examples = [
        open_example_set(prefix, labelled, length, vocab_size, number) if prefix else None for prefix in prefixes
    ]
    return AuxiliaryTask(
        name, ExampleStream([labelled], _order(labelled, SAMPLE_LENGTH, seed, number), length), *examples
    )


def _order(source: TokenSource, sequence_length: int, seed: int, number: int) -> RunOrder:
    number += _FIRST_NUMBER
    ordered = OrderedSource(source.units, weight=1.0, number=number, where=bin_path(source.prefix))
    return RunOrder([ordered], sequence_length, seed)
