"""The config of a run as one frozen value: everything that the run depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megachiar.config.model import ModelConfig
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


class RunConfig(Section):
    """Everything a run depends on."""

    model: ModelConfig
    """What is trained."""
    data: DataConfig
    """What it is trained and validated on."""
    parallel: ParallelConfig = ParallelConfig()
    """How the work is split over ranks. A matter of speed and memory alone."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    optimizer: OptimizerConfig
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps."""
    training: TrainingConfig
    """How long, how much at once, how often evaluated."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and what to start from."""
    logging: LoggingConfig
    """The run folder and what is written there."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys, passed through; one that contradicts a typed key is refused."""

    @property
    def sample_order(self) -> str:
        """What fixes the order of samples beside the seed: Megatron's depends on the length of the run."""
        if self.data.order == "keyed":
            return "keyed"
        return f"megatron over {self.steps * self.training.global_batch_size} samples"

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; those of ``training.epochs`` are known when its data has been measured."""
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
    def document_end(self) -> int | None:
        """Token that ends a document, if no token is to see another document's."""
        return self.data.document_end if self.data.document_mask else None

    @property
    def checkpoint_folder(self) -> Path:
        return self.logging.folder / "checkpoints"

    def to_yaml(self) -> str:
        """The resolved config, defaults included; ``load_config`` reads it back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)
