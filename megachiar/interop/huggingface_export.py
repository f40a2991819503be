"""Export a run to a folder that the library transformers loads, and check that it is the run's model.

    config.json              what the model is, and how it was trained
    modeling_chiar.py        the model: a copy of the file beside this one
    model.safetensors        the weights, or several files with an index
    generation_config.json   the token that ends a text, and the ids that are never sampled
    tokenizer files          as far as the run has a tokenizer
    README.md                the model card

All is written to a folder beside the one that was named, checked there, and renamed: an export is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState, fingerprint_of, read_state
from megachiar.config import RunConfig, load_config
from megachiar.config.tasks import RunTask
from megachiar.data.storage.files import sync_folder
from megachiar.data.tokenizers.tokenizer import ReferenceTokenizer
from megachiar.errors import UserError, disk_errors
from megachiar.interop.huggingface_card import DEFAULT_LICENSE, describe_model_card, result_of
from megachiar.interop.huggingface_check import check_classifier, check_language_model, make_examples, quietly
from megachiar.interop.huggingface_config import MODEL_FILE, check_exportable, describe_export, task_of
from megachiar.interop.huggingface_library import import_transformers
from megachiar.interop.huggingface_tokenizer import check_tokenizer, end_of, export_tokenizer, tokenizer_of
from megachiar.interop.huggingface_weights import SHARD_BYTES, export_weights, read_running
from megachiar.model import build_model

CONFIG_NAME, CARD_NAME = "config.json", "README.md"
MODEL_SOURCE = Path(__file__).with_name(MODEL_FILE)


@dataclass(frozen=True)
class HuggingFaceOptions:
    """How a run is exported.

    Attributes:
        task: name of the task whose model is exported; None for the main one.
        license_name: for the card's field ``license``.
        shard_bytes: bytes of tensors that a file has at most.
        with_tokenizer: whether tokenizer files are written.
        replace: whether another export of that name is replaced.
    """

    task: str | None = None
    license_name: str = DEFAULT_LICENSE
    shard_bytes: int = SHARD_BYTES
    with_tokenizer: bool = True
    replace: bool = False


@dataclass(frozen=True)
class HuggingFaceReport:
    """What was exported.

    Attributes:
        folder: that was written.
        step: of the checkpoint.
        task: that was exported.
        parameters: numbers that the run trains.
        largest_difference: of logits between the run and the export, both in fp64.
        left_out: names of parameters that were not exported.
        notes: what differs from the run, as sentences.
    """

    folder: str
    step: int
    task: str
    parameters: int
    largest_difference: float
    left_out: list[str]
    notes: list[str]


def export_huggingface(
    checkpoint: Path, folder: Path, options: HuggingFaceOptions, asked_by: str = "--to hf"
) -> HuggingFaceReport | None:
    """Write the export of a verified ``checkpoint`` of a run in any layout to ``folder``.

    Returns:
        The report; None where ``folder`` is this export already, and nothing was done.

    Raises:
        UserError: transformers is missing, the model cannot be exported, ``folder`` holds something else, the disk
            refuses it, or the exported model is not the run's.
    """
    transformers = import_transformers(asked_by)
    folder = _place_of(folder)
    config, state = load_config(checkpoint / CONFIG_FILE), read_state(checkpoint)
    check_exportable(checkpoint, config)
    task = task_of(config, options.task)
    tokenizer = tokenizer_of(checkpoint, config) if options.with_tokenizer else None
    origin = {
        "checkpoint": fingerprint_of(checkpoint),
        "task": task.name,
        "license": options.license_name,
        "tokenizer": tokenizer.fingerprint if tokenizer is not None else None,
    }
    if _is_there(folder, origin, options.replace):
        return None
    with _published_when_whole(folder) as partial:
        export = _Export(checkpoint, partial, folder.name, config, state, task, tokenizer)
        export.write_model(origin, options.shard_bytes)
        with quietly(transformers):
            export.write_tokenizer(transformers)
            difference = export.check(transformers)
        return export.write_card(difference, options.license_name)


class _Export:
    """An export that is being written.

    Attributes:
        left_out: names of parameters that are not exported.
        notes: what differs from the run.

    Args:
        checkpoint: that is exported.
        folder: where it is written to.
        name: of the folder in the end.
        config: of the run.
        state: of the checkpoint.
        task: that is exported.
        tokenizer: of the run; None to write none.
    """

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        name: str,
        config: RunConfig,
        state: CheckpointState,
        task: RunTask,
        tokenizer: ReferenceTokenizer | None,
    ):
        self._checkpoint, self._folder, self._name = checkpoint, folder, name
        self._config, self._state, self._task, self._tokenizer = config, state, task, tokenizer
        self._end = end_of(config, tokenizer)
        self._bos = tokenizer.bos_id if tokenizer is not None else None
        self._longest = config.sequence_length if task.head is not None else config.model.max_sequence_length
        self._known = torch.ones(config.model.vocab_size, dtype=torch.bool)
        if tokenizer is not None:
            self._known[:] = False
            self._known[list(tokenizer.known_ids())] = True
        self.left_out: list[str] = []
        self.notes: list[str] = []

    def write_model(self, origin: dict[str, Any], shard_bytes: int) -> None:
        """Write settings, code and weights; ``origin`` says what the export is made of."""
        content = describe_export(self._config, self._task, self._state, read_running(self._checkpoint))
        content["megachiar"]["origin"] = origin
        content |= {"eos_token_id": self._end, "pad_token_id": self._end, "bos_token_id": self._bos}
        _write_json(self._folder / CONFIG_NAME, content)
        shutil.copyfile(MODEL_SOURCE, self._folder / MODEL_FILE)
        if self._task.head is None:
            _write_json(self._folder / "generation_config.json", _generation(self._end, self._known))
        self.left_out = export_weights(self._checkpoint, self._config, self._task, self._folder, shard_bytes)
        self.notes += _notes(self._config, self._task, self._tokenizer, self.left_out)

    def write_tokenizer(self, transformers: Any) -> None:
        """Write the files of the tokenizer, if there is one, and compare its ids with the run's."""
        if self._tokenizer is None:
            return
        is_classifier = self._task.head is not None
        export_tokenizer(
            self._tokenizer, self._folder, end=self._end, longest=self._longest, is_classifier=is_classifier
        )
        self.notes += check_tokenizer(transformers, self._tokenizer, self._folder, self._end)

    def check(self, transformers: Any) -> float:
        """Compare the model with the run's, and return the largest difference of logits."""
        examples = make_examples(self._config, self._known, self._end, self._longest)
        if self._task.head is None:
            return check_language_model(transformers, self._folder, self._checkpoint, examples)
        return check_classifier(transformers, self._folder, self._checkpoint, self._task, examples, self._longest)

    def write_card(self, difference: float, license_name: str) -> HuggingFaceReport:
        """Write the model card, and return the report."""
        model = build_model(self._config.model, seed=0, device="meta", heads=self._config.heads)
        card = describe_model_card(
            self._config,
            self._task,
            self._state,
            name=self._name,
            parameters=model.parameter_count(),
            license_name=license_name,
            result=result_of(self._checkpoint, self._state),
            notes=self.notes,
        )
        (self._folder / CARD_NAME).write_text(card, encoding="utf-8")
        return HuggingFaceReport(
            folder=str(self._folder.with_name(self._name)),
            step=self._state.step,
            task=self._task.name,
            parameters=model.parameter_count(),
            largest_difference=difference,
            left_out=self.left_out,
            notes=self.notes,
        )


def _generation(end: int | None, known: torch.Tensor) -> dict[str, Any]:
    """Return the content of ``generation_config.json``: greedy decoding, and no ids that the tokenizer lacks."""
    content: dict[str, Any] = {"do_sample": False, "eos_token_id": end, "pad_token_id": end if end is not None else 0}
    unknown = (~known).nonzero().flatten().tolist()
    if unknown:
        content["suppress_tokens"] = unknown
    return content


def _notes(
    config: RunConfig, task: RunTask, tokenizer: ReferenceTokenizer | None, left_out: list[str]
) -> Iterator[str]:
    """Yield what a user of the export should know, as sentences without their full stop."""
    model, router = config.model, config.model.router
    routes = len(model.routed_layers) > 0
    if routes and router.kind == "random" and config.document_end is None:
        yield (
            "random routes are drawn by the number of a sequence and the position; here every sequence has number 0, "
            "as in `megachiar generate`, so that a batch gives what single sequences give, and a loss differs from "
            "that of `megachiar evaluate`, which numbers its windows"
        )
    if routes and router.kind not in ("soft", "hard"):
        yield f"fine-tuning leaves the {router.kind} router as it is"
    if routes and router.collapse_weight:
        yield "fine-tuning has no collapse regulariser"
    if model.dropout:
        yield "fine-tuning draws its dropout by torch, not by the keys of the run"
    if left_out:
        yield f"left out, since they belong to other tasks: {', '.join(left_out)}"
    if tokenizer is None:
        yield "no tokenizer is in this folder"
    if task.head is None:
        yield (
            f"texts longer than {model.max_sequence_length:,} tokens are read as they are; `megachiar generate` reads "
            "the last half again"
        )


def _place_of(folder: Path) -> Path:
    """Return where ``folder`` lies, links followed: an export takes the place of the whole folder.

    Raises:
        UserError: it is the folder that the command was started in, which shells would lose.
    """
    with disk_errors(folder, "read"):
        place = folder.resolve()
        if place == Path.cwd():
            raise UserError(folder, "is the current folder, which an export would replace", "name a folder in it")
    return place


def _is_there(folder: Path, origin: dict[str, Any], replace: bool) -> bool:
    """Return whether ``folder`` is this export already.

    Raises:
        UserError: it is something else, and is not to be replaced.
    """
    with disk_errors(folder, "read"):
        if not folder.exists():
            return False
        if folder.is_dir() and not any(folder.iterdir()):
            return False
    try:
        found = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["megachiar"]["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(folder, "exists already, and is no export", "name another folder, or remove this one") from None
    if found == origin:
        return True
    if not replace:
        raise UserError(folder, "exists already, and is another export", "name another folder, or add --overwrite")
    return False


@contextlib.contextmanager
def _published_when_whole(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``, which takes its place if nothing goes wrong, and is removed if it does."""
    partial, old = (folder.with_name(f"{folder.name}.{state}") for state in ("incomplete", "replaced"))
    with disk_errors(partial):
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
