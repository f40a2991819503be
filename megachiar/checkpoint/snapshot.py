"""Copy what a checkpoint holds into the host's memory, so that training may go on while it is written.

Only a snapshot of an engine imports DeepSpeed. A program that writes weights without an engine starts faster.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachiar.checkpoint.checksums import FileRecord
from megachiar.checkpoint.format import NO_STEPS, NOTHING_SPENT, CheckpointState, RecentSteps, Spent
from megachiar.checkpoint.sharded_tensors import HostMemory, ShardWriter
from megachiar.config import RunConfig
from megachiar.data.sampling.history import DataHistory
from megachiar.data.sampling.history_records import SourceRecord

if TYPE_CHECKING:
    from megachiar.engine.engine import Engine


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes of a checkpoint; nothing in it changes when training goes on.

    Attributes:
        step: optimizer steps taken.
        config: of the run.
        fields: of the checkpoint's record, without what its files are.
        shards: this rank's share of weights, moments and buffers.
    """

    step: int
    config: RunConfig
    fields: dict[str, Any]
    shards: ShardWriter

    @property
    def folder(self) -> Path:
        """Return the folder of the run's checkpoints."""
        return self.config.checkpoint_folder

    def record(self, files: Mapping[str, FileRecord]) -> CheckpointState:
        """Return the record of the checkpoint with these ``files``, by name."""
        ordered = sorted(files.items())
        return CheckpointState(
            **self.fields,
            files={name: file.size for name, file in ordered},
            checksums={name: file.checksum for name, file in ordered},
        )


def take_snapshot(
    engine: Engine,
    step: int,
    data: DataHistory,
    validation: Mapping[str, float],
    recent: RecentSteps = NO_STEPS,
    memory: HostMemory | None = None,
    validation_data: Mapping[str, SourceRecord] | None = None,
    auxiliary_samples: Mapping[str, int] | None = None,
    spent: Spent = NOTHING_SPENT,
    maximised: Collection[str] = (),
) -> Snapshot:
    """Gather weights and optimizer state, and copy this rank's share; every rank calls this function.

    Args:
        engine: holds weights, optimizer state and loss scale.
        step: optimizer steps taken.
        data: what the run has read so far.
        validation: loss in nats a token on validation sets after this step, by name.
        recent: what the run compares its next steps with.
        memory: takes the copies, and must not be in use by another snapshot; None for new memory.
        validation_data: what the validation sets of the run hold, by name.
        auxiliary_samples: samples that each auxiliary task has read, by name; None where there is none.
        spent: what the run has spent so far.
        maximised: names of ``validation`` of which the highest is the best.
    """
    from megachiar.engine.deepspeed_patches import loss_scale_state
    from megachiar.engine.gathered_state import gather_state

    config, shards = engine.config, ShardWriter(engine.topology, memory)
    mine = False
    for tensor in gather_state(engine):
        if tensor.moment is None:
            mine = shards.is_mine(tensor.shard)
        if mine:
            shards.add(tensor.name, tensor.moment, tensor.value, tensor.shard)
    resume = config.checkpoint.resume
    fields = {
        "step": step,
        "samples": data.samples_before(step),
        "data": data,
        "optimizer_steps": step - engine.skipped_steps,
        "loss_scale": loss_scale_state(engine.deepspeed),
        "recent": recent,
        "spent": spent,
        "layout": engine.topology.describe() + f", ZeRO {config.parallel.zero_stage}, {config.precision.compute}",
        "validation": dict(validation),
        "maximised": tuple(name for name in validation if name in maximised),
        "validation_data": dict(validation_data or {}),
        "auxiliary_samples": dict(auxiliary_samples or {}),
        "went_back_to": resume if isinstance(resume, int) else None,
    }
    return Snapshot(step, config, fields, shards)
