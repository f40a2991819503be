"""Import a folder that transformers loads, one of our exports or what fine-tuning has made of it, as a run folder.

Weights come back bit for bit, those of 16 bits as the same numbers in fp32. What a run keeps beside its weights, such
as running thresholds, and the training's settings come from ``config.json``. No code of the folder is executed.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megachiar.config import RunConfig
from megachiar.config.load import parse_with_overrides
from megachiar.config.tasks import MAIN_TASK
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.storage.files import block_checksums
from megachiar.data.storage.regular_file import check_regular, read_regular
from megachiar.data.tokenizers.recorded import load_as_recorded, read_kept_record
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError, disk_errors
from megachiar.interop.huggingface_config import EXPORT_FORMAT, RUNNING, model_settings
from megachiar.interop.huggingface_tokenizer import KEPT
from megachiar.interop.huggingface_weights import BACKBONE, HEAD, INDEX_FILE, WEIGHTS_FILE
from megachiar.interop.imported_run import (
    ImportedRun,
    ImportReport,
    check_overrides,
    check_tokenizer_fits,
    earlier_report,
    write_run,
)
from megachiar.model import build_model

CONFIG_NAME = "config.json"
_ANOTHER = "give a folder that `megachiar export --to hf` has written, or one fine-tuned from it"
_MAY_CHANGE = {"vocab_size", "max_position_embeddings", "dropout", "initializer_range", "hard_gradient", "noise"}
"""Settings that fine-tuning may change: they say nothing of logits, or the shape of a tensor says them."""
_SECTIONS = ("model", "task", "data", "precision", "optimizer", "schedule", "training", "running")


def check_is_export(folder: Path) -> None:
    """Check that ``folder`` may be an export.

    Raises:
        UserError: it has no settings, or the system refuses to look at it.
    """
    with disk_errors(folder, "read"):
        if not (folder / CONFIG_NAME).exists():
            raise UserError(folder, f"it is a folder without {CONFIG_NAME}, and no export", _ANOTHER)


def import_huggingface(
    folder: Path, run: Path, *, tokenizer: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[ImportReport, bool]:
    """Write the run folder ``run`` from the export in ``folder``.

    Args:
        folder: of the export.
        run: the run folder, which does not exist yet or holds the same import, perhaps in part.
        tokenizer: kept in the run folder in place of the export's; None takes that.
        overrides: keys of the config, outside of ``model``.

    Returns:
        The report, and whether anything was written: the same import does nothing a second time.

    Raises:
        UserError: the folder, the options or the run folder do not allow the import.
    """
    check_overrides(overrides, "folder")
    content = _read_json(folder / CONFIG_NAME)
    section = _section(folder, content)
    files = _weight_files(folder)
    requested = {
        "folder": {path.name: block_checksums(path) for path in (folder / CONFIG_NAME, *files)},
        "tokenizer": str(tokenizer) if tokenizer is not None else None,
        "overrides": list(overrides),
    }
    if (before := earlier_report(run, requested)) is not None:
        return before, False
    tensors = {name: tensor for file in files for name, tensor in _read_tensors(file).items()}
    task, classes = _task(folder, content, section, tensors)
    config = _config(folder, run, section, task, overrides)
    weights = _weights(folder, config, tensors, section["running"])
    _check_settings(folder, content, section, config)
    found = _tokenizer(folder, tokenizer)
    check_tokenizer_fits(found, config, folder)
    losses = {name: float(loss) for name, loss in section.get("validation", {}).items()}
    imported = ImportedRun(
        config=config,
        weights=weights,
        step=section["step"],
        validation=losses,
        source=SourceRecord(path="the data of the exported run", tokens=0, checksum=None, classes=classes),
        origin=f"imported from {folder.name}",
        tokenizer=found,
    )
    is_text, loss = task["kind"] == "language_model", next(iter(losses.values()), None)
    report = ImportReport(
        checkpoint=str(imported.checkpoint),
        model=config.model.model_dump(mode="json"),
        task=config.task.model_dump(mode="json"),
        parameters=build_model(config.model, seed=0, device="meta", heads=config.heads).parameter_count(),
        perplexity=math.exp(min(loss, 700.0)) if is_text and loss is not None and len(losses) == 1 else None,
        accuracy=None,
        left_out=[],
        notes=_notes(tensors, found, section["training"].get("evaluate_every"), config),
    )
    write_run(run, imported, requested, report)
    return report, True


def _notes(
    tensors: Mapping[str, torch.Tensor], tokenizer: Tokenizer | None, evaluate_every: int | None, config: RunConfig
) -> list[str]:
    notes = []
    if narrow := {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"}:
        notes.append(f"weights of {', '.join(sorted(narrow))} are fp32 numbers now")
    if tokenizer is None:
        notes.append("the folder has no tokenizer of a run: --tokenizer names one")
    if evaluate_every and not config.data.validation:
        notes.append(
            f"training.evaluate_every, {evaluate_every} in the run, is left out: an export has no validation data; "
            "--set data.validation.NAME=PREFIX names some"
        )
    return notes


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        UserError: it is missing, cannot be read, or holds no mapping.
    """
    with disk_errors(path, "read"):
        check_regular(path)
        text = read_regular(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(path, f"holds broken JSON: {error}", _ANOTHER) from None
    if not isinstance(content, dict):
        raise UserError(path, f"holds a {type(content).__name__}, and no settings by name", _ANOTHER)
    return content


def _section(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the section ``megachiar`` of ``config.json``.

    Raises:
        UserError: there is none that this version reads.
    """
    where, section = folder / CONFIG_NAME, content.get("megachiar")
    if not isinstance(section, dict):
        kind = content.get("model_type")
        raise UserError(where, f"has no section megachiar: it is a model of type {kind!r}, and no export", _ANOTHER)
    if section.get("format") != EXPORT_FORMAT:
        problem = f"megachiar.format is {section.get('format')!r}, and this version reads {EXPORT_FORMAT}"
        raise UserError(where, problem, f"use the version that wrote it: {section.get('created_by')}")
    for name in _SECTIONS:
        if not isinstance(section.get(name), dict):
            raise UserError(where, f"megachiar.{name} is {section.get(name)!r}, and no mapping", _ANOTHER)
    for name in ("running", "validation"):
        numbers = section.get(name, {})
        if not isinstance(numbers, dict) or any(type(number) not in (int, float) for number in numbers.values()):
            raise UserError(where, f"megachiar.{name} is {numbers!r:.80}, and no numbers by name", _ANOTHER)
    if type(section.get("step")) is not int or section["step"] < 0:
        raise UserError(where, f"megachiar.step is {section.get('step')!r}, which is no number of steps", _ANOTHER)
    return section


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of weights of ``folder``, those that its index names or the only one.

    Raises:
        UserError: there is none, or the index names a file elsewhere.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / WEIGHTS_FILE).exists():
            raise UserError(folder, f"holds neither {WEIGHTS_FILE} nor {INDEX_FILE}", _ANOTHER)
        return [folder / WEIGHTS_FILE]
    where = _read_json(index).get("weight_map")
    names = set(where.values()) if isinstance(where, dict) else set()
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(index, f"weight_map names {name!r}, which is no file of the folder", _ANOTHER)
        if not (folder / name).exists():
            raise UserError(folder, f"lacks {name}, which {INDEX_FILE} names", f"{_ANOTHER}, whole")
    if not names:
        raise UserError(index, "has no weight_map", _ANOTHER)
    return [folder / name for name in sorted(names)]


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        UserError: it is missing or damaged.
    """
    with disk_errors(path, "read"):
        check_regular(path)
        try:
            with safe_open(path, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, ValueError) as error:
            raise UserError(path, f"cannot be read: {str(error).splitlines()[0]}", f"{_ANOTHER}, whole") from None


def _task(
    folder: Path, content: dict[str, Any], section: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Return the section ``task`` of the run, and the names of its classes; None of a language model.

    A language model that was fine-tuned to classify has a head, which the section of its export does not know.
    """
    task = dict(section["task"])
    if not any(name.startswith(HEAD) for name in tensors):
        return {"kind": "language_model"}, None
    labels = content.get("id2label")
    if not isinstance(labels, dict) or len(labels) < 2 or not all(key.isdecimal() for key in labels):
        problem = f"id2label is {labels!r:.80}, and no names of two classes or more by their numbers"
        raise UserError(folder / CONFIG_NAME, problem, _ANOTHER)
    task |= {"kind": "classification", "classes": len(labels)}
    task |= {key: content[key] for key in ("head", "padding") if key in content}
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return task, None if names[0].startswith("LABEL_") else names


def _config(
    folder: Path, run: Path, section: dict[str, Any], task: dict[str, Any], overrides: Sequence[str]
) -> RunConfig:
    """Return the config of the run; the paths of its data are those that our pages name."""
    is_text = task["kind"] == "language_model"
    mapping: dict[str, Any] = {
        name: copy.deepcopy(section[name]) for name in _SECTIONS if name not in ("running", "task", "data")
    }
    data = {key: value for key, value in section["data"].items() if value is not None}
    data["train"] = [{"path": "data/train" if is_text else "data/labelled/train"}]
    if not is_text:
        data |= {"document_mask": False}
    mapping |= {"task": task, "data": data, "logging": {"folder": str(run)}}
    evaluate_every = mapping["training"].pop("evaluate_every", None)
    config = parse_with_overrides(mapping, overrides, str(folder / CONFIG_NAME))
    if evaluate_every is None or not config.data.validation:  # an export has no data that a run could be evaluated on
        return config
    mapping["training"]["evaluate_every"] = evaluate_every
    return parse_with_overrides(mapping, overrides, str(folder / CONFIG_NAME))


def _check_settings(folder: Path, content: dict[str, Any], section: dict[str, Any], config: RunConfig) -> None:
    """Check that the settings beside the section ``megachiar``, of the library's model, are those of the section's.

    A setting that is missing has its default, which ``save_pretrained`` leaves out.

    Raises:
        UserError: a setting was changed by hand, so that the imported model would be another one than the library's.
    """
    settings = model_settings(config.model, section["running"])
    if config.task.kind == "language_model":
        settings["document_end"] = config.document_end
    for name in settings.keys() - _MAY_CHANGE:
        if name in content and not _same(content[name], settings[name]):
            problem = f"{name} is {content[name]!r}, but the section megachiar has a model with {settings[name]!r}"
            raise UserError(folder / CONFIG_NAME, problem, "undo the change, or make it in the run and export that")


def _same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal, numbers up to their rounding."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _weights(
    folder: Path, config: RunConfig, tensors: Mapping[str, torch.Tensor], running: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return every tensor of the run's model by our name, fp32.

    Raises:
        UserError: the folder has other tensors than the model.
    """
    heads = f"classifiers.{MAIN_TASK}."
    found = {}
    for name, tensor in tensors.items():
        ours = f"{heads}{name.removeprefix(HEAD)}" if name.startswith(HEAD) else name.removeprefix(BACKBONE)
        found[ours] = tensor.float()
        if not bool(found[ours].isfinite().all()):
            problem = f"{name} holds numbers that are not finite"
            raise UserError(folder, problem, "give a folder of weights that training has not spoiled")
    for name, value in running.items():
        found[name] = torch.tensor([value], dtype=torch.float32)
    expected = build_model(config.model, seed=0, device="meta", heads=config.heads).state_dict()
    for name, tensor in expected.items():
        if name not in found:
            where = f"{CONFIG_NAME} has no megachiar.running.{name}" if name.endswith(RUNNING) else f"lacks {name}"
            raise UserError(folder, where, _ANOTHER)
        if found[name].shape != tensor.shape:
            problem = (
                f"{name} has shape {tuple(found[name].shape)}, and the model of {CONFIG_NAME} {tuple(tensor.shape)}"
            )
            raise UserError(folder, problem, _ANOTHER)
    if others := sorted(found.keys() - expected.keys()):
        raise UserError(folder, f"has {others[0]}, which the model of {CONFIG_NAME} has not", _ANOTHER)
    return {name: found[name] for name in expected}


def _tokenizer(folder: Path, given: Path | None) -> Tokenizer | None:
    """Return the tokenizer that is kept in the run folder; None if there is none."""
    if given is not None:
        return load_tokenizer(given)
    record = read_kept_record(folder / KEPT)
    if record is None:
        return None
    return load_as_recorded(folder / KEPT / record.file, record, folder / KEPT)
