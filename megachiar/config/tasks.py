"""The sections ``task:`` and ``mixed:`` say what a run learns besides language modelling."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from megachiar.config.model import Share
from megachiar.config.paths import ConfigPath
from megachiar.config.section import Section

Classes = Annotated[int, Field(ge=2)]


class HeadConfig(NamedTuple):
    """A classification head.

    Attributes:
        classes: C.
        kind: linear, or mlp: a hidden layer of d channels with GELU and dropout before the linear one.
        padding: masked or counted, see ``TaskConfig.padding``.
    """

    classes: int
    kind: Literal["linear", "mlp"]
    padding: Literal["masked", "counted"]


class TaskConfig(Section):
    """What the run learns: to predict the next token, or the class of a sequence."""

    kind: Literal["language_model", "classification"] = "language_model"
    """language_model: the next token. classification: the class of a whole sequence, by a head on the mean of its final
    hidden states. data.train and data.validation then name labelled datasets."""
    classes: Classes | None = None
    """classification: classes of the labelled datasets."""
    head: Literal["linear", "mlp"] = "linear"
    """classification: linear, or mlp: a hidden layer of hidden_size channels with GELU and dropout before it, which is
    the published head."""
    padding: Literal["masked", "counted"] = "masked"
    """classification: what fills a sequence up to data.sequence_length. masked: it is left out of the mean, of
    meta_router.pool: batch and of all statistics. counted: it is token 0 like any other, as published."""

    @property
    def head_config(self) -> HeadConfig:
        """The head of a classification run."""
        assert self.classes is not None, "the config checks that a classification run has classes"
        return HeadConfig(self.classes, self.head, self.padding)


class AuxiliaryTaskConfig(Section):
    """A task that a mixed run learns beside its main language model."""

    kind: Literal["language_model", "classification"]
    """language_model: the next token of an indexed dataset. classification: the class of a labelled dataset's
    sequences, by a head of its own."""
    data: ConfigPath
    """Prefix of the dataset that the task trains on."""
    validation: ConfigPath | None = None
    """Prefix of the dataset that the task is evaluated on, under the task's name; null for none."""
    test: ConfigPath | None = None
    """Prefix of the dataset that the task is tested on once, after the last step, under the task's name; null for
    none."""
    global_batch_size: PositiveInt
    """Sequences of the task's batch each time it is drawn, over all ranks: a multiple of micro_batch_size times the
    data-parallel ranks."""
    weight: PositiveFloat = 1.0
    """Share of draws that take this task, relative to the other tasks' weights."""
    loss_weight: PositiveFloat = 1.0
    """Factor of the task's loss beside that of the main language model."""
    classes: Classes | None = None
    """classification: number of classes."""
    head: Literal["linear", "mlp"] = "linear"
    """classification: as task.head."""
    padding: Literal["masked", "counted"] = "masked"
    """classification: as task.padding."""

    @property
    def head_config(self) -> HeadConfig | None:
        """The head of a classification task; None of a language model, which uses the model's own."""
        if self.kind == "language_model":
            return None
        assert self.classes is not None, "the config checks that a classification task has classes"
        return HeadConfig(self.classes, self.head, self.padding)


class MixedConfig(Section):
    """Mixed training (paper, MetaRouter): batches of other tasks join those of the main language model."""

    probability: Share = 0.25
    """Probability that a group of the main language model's sequences is joined by a batch of another task, whose mean
    loss is added to the group's. It is drawn by a key: the same in every layout, and after a resume."""
    group_size: PositiveInt | None = None
    """Sequences of the main language model that one draw is made for, a divisor of training.global_batch_size. The
    published training draws for each micro-batch; here the micro-batch size changes nothing."""
    seed: NonNegativeInt = 0
    """Seed of the draws."""
    tasks: dict[str, AuxiliaryTaskConfig] = {}
    """The other tasks by name; none: the run is not mixed."""

    @field_validator("tasks")
    @classmethod
    def _sort_tasks(cls, tasks: dict[str, AuxiliaryTaskConfig]) -> dict[str, AuxiliaryTaskConfig]:
        """Bring the tasks into one order, on which the draws depend, however a file lists them."""
        return dict(sorted(tasks.items()))


MAIN_TASK = "main"
"""Name of the task that ``data.train`` is for."""


class RunTask(NamedTuple):
    """A task of a run.

    Attributes:
        name: of the task; ``MAIN_TASK`` for the one of ``data.train``.
        head: its classification head; None for a language model.
    """

    name: str
    head: HeadConfig | None
