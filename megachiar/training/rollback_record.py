"""Record a rollback on the disk at once, for a run that ends before its next checkpoint.

    RUN/rollback.json     to which checkpoint, how often, and the history of the data with what is left out since

A run that goes on from that checkpoint leaves out the same samples, and goes on counting. A later checkpoint has the
history itself; the record then belongs to another checkpoint and is not read.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from megachiar.checkpoint.format import fingerprint_of
from megachiar.checkpoint.sealing import SEAL, seal_fits, sealed_json
from megachiar.data.sampling.history import DataHistory
from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import UserError, disk_error, disk_errors


class RollbackRecord(BaseModel):
    """The rollbacks of a run to one checkpoint.

    Attributes:
        checkpoint: hash of the checkpoint's record, see ``fingerprint_of``.
        rollbacks: how often the run went back to it.
        data: history of the data, without the samples of the bad steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    rollbacks: int = Field(ge=1)
    data: DataHistory


def rollback_path(run: Path) -> Path:
    """Return the file of a run's newest rollback."""
    return run / "rollback.json"


def write_rollback(run: Path, checkpoint: Path, rollbacks: int, data: DataHistory) -> None:
    """Record that the run in folder ``run`` went back to ``checkpoint`` for the ``rollbacks``-th time.

    Raises:
        UserError: the disk refuses it.
    """
    record = RollbackRecord(checkpoint=fingerprint_of(checkpoint), rollbacks=rollbacks, data=data)
    with disk_errors(rollback_path(run)):
        write_atomically(rollback_path(run), sealed_json(record))


def read_rollback(run: Path, checkpoint: Path) -> RollbackRecord | None:
    """Return the rollbacks of the run in folder ``run`` to ``checkpoint``; None if there were none.

    Raises:
        UserError: the record is damaged or cannot be read. Without it a run would read other samples.
    """
    path = rollback_path(run)
    try:
        text = read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise disk_error(path, error, "read") from error
    try:
        if not seal_fits(text):
            raise ValueError("its seal does not fit its content")
        fields = from_json(text)
        del fields[SEAL]
        record = RollbackRecord.model_validate(fields)
    except ValueError as error:
        raise UserError(
            path,
            f"is damaged: {str(error).splitlines()[0]}",
            "put back an undamaged copy; or remove it: the run then meets the bad samples again, and goes back again",
        ) from error
    return record if record.checkpoint == fingerprint_of(checkpoint) else None
