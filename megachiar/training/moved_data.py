"""Read the datasets that a past step has read, wherever they are now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from megachiar.config import RunConfig
from megachiar.config.sections import SourceConfig
from megachiar.config.tasks import HeadConfig
from megachiar.data.sampling.history import DataHistory, SourceRecord
from megachiar.errors import UserError
from megachiar.training.run_data import open_recorded, record_of


def with_data_of_step(config: RunConfig, history: DataHistory, step: int, elsewhere: Iterable[Path]) -> RunConfig:
    """Return ``config`` with the sources, sample length and batch size that ``step`` had.

    A dataset is recognised by its content, as by a run that continues.

    Args:
        config: of the step in all else.
        history: of a run that has taken the step.
        step: counted from 1.
        elsewhere: where a dataset may be that is not at the path where the run has read it.

    Raises:
        UserError: a dataset is at none of these paths.
    """
    order, batch = history.order_of(step), len(history.samples_of(step))
    candidates, head = list(elsewhere), config.tasks[0].head
    sources = [
        _find(number, history.sources[share.source], candidates, head).model_copy(update={"weight": share.weight})
        for number, share in enumerate(order.shares)
    ]
    # The micro-batch has no influence on the result; it must divide the batch.
    micro_batch = math.gcd(config.training.micro_batch_size, batch)
    length = order.sequence_length if head is None else config.sequence_length
    data = {"train": tuple(sources), "sequence_length": length}
    training = {"global_batch_size": batch, "micro_batch_size": micro_batch}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "training": config.training.model_copy(update=training),
        }
    )


def _find(number: int, record: SourceRecord, elsewhere: Sequence[Path], head: HeadConfig | None) -> SourceConfig:
    for path in (Path(record.path), *elsewhere):
        try:
            source = open_recorded(path, record, head.classes if head is not None else None)
            if record.same_data(record_of(source)):
                read, whole = record.tokens, source.whole
                # Half a unit less, which is rounded up: no rounding of the quotient changes the number.
                return SourceConfig(path=path, fraction=1.0 if read == whole else (read - 0.5) / whole)
        except UserError:  # nothing is there, or something else
            continue
    raise UserError(
        record.path,
        "is gone, or is no longer the dataset that this step has read",
        f"put that dataset back; where it has moved, give its new path: --set data.train.{number}.path=PATH",
    )
