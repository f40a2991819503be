"""The config of a run as one frozen value: everything that the run depends on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megachiar.config.evaluation import EvaluationConfig
from megachiar.config.model import ModelConfig
from megachiar.config.profiling import ProfilingConfig
from megachiar.config.reliability import ReliabilityConfig
from megachiar.config.section import Section
from megachiar.config.sections import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainingConfig,
    sample_length,
)
from megachiar.config.tasks import MAIN_TASK, HeadConfig, MixedConfig, RunTask, TaskConfig


class RunConfig(Section):
    """Everything that a run depends on."""

    model: ModelConfig
    """What is trained."""
    task: TaskConfig = TaskConfig()
    """What the run learns."""
    mixed: MixedConfig = MixedConfig()
    """Tasks that are learnt beside the main language model."""
    data: DataConfig
    """The data that the model is trained and validated on."""
    parallel: ParallelConfig = ParallelConfig()
    """How the work is split over ranks. It changes speed and memory alone."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    optimizer: OptimizerConfig
    """The settings of the optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over steps."""
    training: TrainingConfig
    """How long the run is, how much a step reads, and how often the model is evaluated."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What the run is asked beside its validation sets."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run saves, and the checkpoint that it starts from."""
    reliability: ReliabilityConfig = ReliabilityConfig()
    """How the run notices that something is wrong, and what it does."""
    logging: LoggingConfig
    """The run folder and the files written to it."""
    profiling: ProfilingConfig = ProfilingConfig()
    """Steps that PyTorch's profiler records."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys, which are passed through. One that contradicts a typed key, switches off a check or changes
    silently what the typed keys say is refused. DeepSpeed has no list
    of them and ignores a section whose name it does not know, so check the spelling."""

    @property
    def sample_order(self) -> str:
        """The name of the order of samples; Megatron's includes the samples of the run, on which it depends."""
        if self.data.order == "keyed":
            return "keyed"
        return f"megatron over {self.steps * self.training.global_batch_size} samples"

    @property
    def steps(self) -> int:
        """Optimizer steps of the run. Those of ``training.epochs`` are known once its data has been measured."""
        assert self.training.steps is not None, "training.epochs is not resolved yet"
        return self.training.steps

    def with_steps(self, steps: int) -> RunConfig:
        """Return this config with its steps resolved."""
        return self.model_copy(update={"training": self.training.model_copy(update={"steps": steps})})

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sample."""
        return sample_length(self.model, self.data)

    @property
    def tasks(self) -> tuple[RunTask, ...]:
        """The tasks of the run, the one of ``data.train`` first."""
        main = self.task.head_config if self.task.kind == "classification" else None
        others = (RunTask(name, task.head_config) for name, task in self.mixed.tasks.items())
        return RunTask(MAIN_TASK, main), *others

    @property
    def heads(self) -> dict[str, HeadConfig]:
        """The classification heads of the model by the name of their task."""
        return {task.name: task.head for task in self.tasks if task.head is not None}

    @property
    def document_end(self) -> int | None:
        """The id that ends a document, where no token may attend to another document; else None."""
        return self.data.document_end if self.data.document_mask else None

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.logging.folder / "checkpoints"

    def flat(self) -> dict[str, Any]:
        """Return the value of every key as JSON has it, by dotted key such as ``data.train``."""
        return dict(flatten(self.model_dump(mode="json"), ""))

    def to_yaml(self) -> str:
        """Return the resolved config with all defaults; ``load_config`` reads it back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def flatten(mapping: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted key, each behind ``prefix``."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
