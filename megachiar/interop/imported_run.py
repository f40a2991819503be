"""Write the run folder of an import, and tell whether it holds the same import already.

RUN/imported.json       what was imported, and with which options; written first
RUN/config.yaml         of the run
RUN/tokenizer/          if there is a tokenizer
RUN/checkpoints/        one checkpoint of the weights; written last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megachiar.checkpoint.format import CONFIG_FILE, checkpoint_name, complete_checkpoints
from megachiar.checkpoint.weights_alone import write_weights
from megachiar.config import RunConfig
from megachiar.data.preprocessing.existing import OutputDiffers, read_note, write_note
from megachiar.data.sampling.history import DataHistory
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.storage.files import temporary_path, write_atomically
from megachiar.data.tokenizers.recorded import keep_tokenizer
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.errors import UserError, disk_errors

NOTE = "imported.json"


@dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes:
        checkpoint: folder of the checkpoint that was written.
        model, task: these sections of the config, as JSON has them.
        parameters: how many numbers the model trains.
        perplexity: on the validation set of the file; None where the file does not say.
        accuracy: of a classifier on the test set of the file, in percent; None where the file does not say.
        left_out: names of trained tensors of the file that were not imported.
        notes: what differs from the file or from what one may expect, as sentences.
    """

    checkpoint: str
    model: dict[str, Any]
    task: dict[str, Any]
    parameters: int
    perplexity: float | None
    accuracy: float | None
    left_out: list[str]
    notes: list[str]


@dataclass(frozen=True)
class ImportedRun:
    """A run that is made of other people's weights.

    Attributes:
        config: of the run.
        weights: every parameter and buffer of the model, whole, by name.
        step: optimizer steps that they were trained for.
        validation: losses in nats a token on validation sets, by name.
        source: what they were trained on, as far as that is known.
        origin: where they come from, for the record of the checkpoint.
        tokenizer: of the model; None to keep none.
    """

    config: RunConfig
    weights: Mapping[str, torch.Tensor]
    step: int
    validation: Mapping[str, float]
    source: SourceRecord
    origin: str
    tokenizer: Tokenizer | None

    @property
    def checkpoint(self) -> Path:
        """The folder of its checkpoint."""
        return self.config.checkpoint_folder / checkpoint_name(self.step)


def check_overrides(overrides: Sequence[str], where: str) -> None:
    """Check that ``--set`` changes nothing that ``where``, the file or folder, says.

    Raises:
        UserError: it does.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key.partition(".")[0] in ("model", "task", "mixed", "logging"):
            problem = f"the {where} says what the model is, and --output where the run folder is"
            raise UserError(f"--set {override}", problem, "leave it out; `megachiar import --help` lists the options")


def check_tokenizer_fits(tokenizer: Tokenizer | None, config: RunConfig, path: Path) -> None:
    """Check that the embedding of the model at ``path`` has a row for each id of the tokenizer.

    Raises:
        UserError: it has too few.
    """
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        problem = f"has {tokenizer.vocab_size:,} ids, and the embedding of {path} {config.model.vocab_size:,} rows"
        where = f"--tokenizer {tokenizer.path}"
        raise UserError(where, problem, "give the tokenizer that the model was trained with")


def earlier_report(run: Path, requested: dict[str, Any]) -> ImportReport | None:
    """Return the report of the same import that ``run`` holds already; None if it is to be made, or finished.

    Raises:
        UserError: ``run`` holds something else.
    """
    note = run / NOTE
    with disk_errors(run, "read"):
        if not run.exists():
            return None
        others = {path.name for path in run.iterdir()} - {NOTE, temporary_path(note).name}
    remedy = "name another folder with --output"
    if not note.exists():
        if others:
            raise UserError(run, f"holds {min(others)}: it is no folder of an import", remedy)
        return None
    try:
        report = ImportReport(**read_note(note, requested, []))
    except (OutputDiffers, TypeError) as why:
        raise UserError(run, f"holds another import: {why}", remedy) from None
    return report if complete_checkpoints(run / "checkpoints") else None


def write_run(run: Path, imported: ImportedRun, requested: dict[str, Any], report: ImportReport) -> None:
    """Write the run folder ``run``, the note first and the checkpoint last.

    Raises:
        UserError: the disk is full or refuses to be written.
    """
    config = imported.config
    write_note(run / NOTE, requested, [], asdict(report))
    if imported.tokenizer is not None:
        keep_tokenizer(imported.tokenizer, run)
    write_atomically(run / CONFIG_FILE, config.to_yaml().encode())
    history = DataHistory.initial(
        [(imported.source, 1.0)],
        sequence_length=config.sequence_length,
        global_batch_size=config.training.global_batch_size,
        seed=config.training.seed,
        order=config.sample_order,
    )
    write_weights(
        config,
        imported.weights,
        step=imported.step,
        data=history,
        origin=imported.origin,
        validation=imported.validation,
    )
