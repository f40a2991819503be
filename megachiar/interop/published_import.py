"""Import a published checkpoint: write a run folder that evaluates, generates, and starts further training.

``imported_run.py`` has the files of the folder. Its config has the published code's training as far as the file does
not say.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megachiar.config import RunConfig
from megachiar.config.load import parse_with_overrides
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.storage.files import block_checksums
from megachiar.data.storage.regular_file import check_regular
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError, disk_errors
from megachiar.interop.imported_run import (
    ImportedRun,
    ImportReport,
    check_overrides,
    check_tokenizer_fits,
    earlier_report,
    write_run,
)
from megachiar.interop.published_file import PublishedFile, read_published
from megachiar.interop.published_model import (
    ImportOptions,
    convert,
    describe_model,
    describe_task,
    left_out,
    missing_tau,
)
from megachiar.model import ChiarFormer, build_model

VALIDATION_SET = "published"
"""The name of the published code's validation loss in the record of the checkpoint."""
_TRAINING: dict[str, Any] = {
    "data": {"train": [{"path": "data/wikitext-103/train"}]},
    "optimizer": {"learning_rate": 1e-4, "decay_all": True},
    "schedule": {"warmup_steps": 1000, "minimum_learning_rate": 1e-6},
    "training": {"global_batch_size": 128, "micro_batch_size": 8},
}
"""The published code's training of a language model, and where our pages put its data."""
_OF_CLASSIFIERS: dict[str, Any] = {
    "data": {"train": [{"path": "data/labelled/train"}]},
    "optimizer": {"learning_rate": 5e-5, "decay_all": True},
    "schedule": {"warmup_steps": 200, "minimum_learning_rate": 1e-6},
    "training": {"global_batch_size": 8, "micro_batch_size": 8},
}
"""The published code's training of a classifier."""

FindTau = Callable[[ChiarFormer], float]
"""Returns the threshold for a model, from its weights and a text."""


def import_published(
    path: Path,
    run: Path,
    options: ImportOptions,
    *,
    tokenizer: Path | None = None,
    overrides: Sequence[str] = (),
    calibration: str | None = None,
    find_tau: FindTau | None = None,
) -> tuple[ImportReport, bool]:
    """Write the run folder ``run`` from the published checkpoint at ``path``.

    Args:
        path: of the file.
        run: the run folder, which does not exist yet or holds the same import, perhaps in part.
        options: for what the file may not say.
        tokenizer: the one that the model was trained with, to be kept in the run folder; None to keep none.
        overrides: keys of the config, outside of ``model``.
        calibration: what ``find_tau`` reads, as the note has it.
        find_tau: finds the threshold of a router that has none.

    Returns:
        The report, and whether anything was written: the same import does nothing a second time.

    Raises:
        UserError: the file, the options or the run folder do not allow the import.
    """
    check_overrides(overrides, "file")
    found_tokenizer = load_tokenizer(tokenizer) if tokenizer is not None else None
    with disk_errors(path, "read"):
        check_regular(path)
    requested = {
        "file": block_checksums(path),
        **asdict(options),
        "tokenizer": found_tokenizer.fingerprint if found_tokenizer is not None else None,
        "overrides": list(overrides),
        "calibration": calibration,
    }
    if (before := earlier_report(run, requested)) is not None:
        return before, False
    file = read_published(path)
    section = describe_model(file, options)
    config, weights = _config_and_weights(file, run, section, overrides, find_tau)
    check_tokenizer_fits(found_tokenizer, config, path)
    imported = ImportedRun(
        config=config,
        weights=weights,
        step=file.step,
        validation={VALIDATION_SET: math.log(file.perplexity)} if file.perplexity is not None else {},
        source=SourceRecord(path="the data of the published training", tokens=0, checksum=None),
        origin=f"imported from {path.name}",
        tokenizer=found_tokenizer,
    )
    report = ImportReport(
        checkpoint=str(imported.checkpoint),
        model=config.model.model_dump(mode="json"),
        task=config.task.model_dump(mode="json"),
        parameters=sum(tensor.numel() for tensor in weights.values()),
        perplexity=file.perplexity,
        accuracy=file.accuracy,
        left_out=left_out(file),
        notes=_notes(file, options, config),
    )
    write_run(run, imported, requested, report)
    return report, True


def _config_and_weights(
    file: PublishedFile, run: Path, section: dict[str, Any], overrides: Sequence[str], find_tau: FindTau | None
) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    """Return the config of the run and its parameters by name; a threshold that is missing is found on the way.

    Raises:
        UserError: as ``import_published``.
    """
    router = section["router"]
    lacks_tau = router.get("kind") == "threshold" and router["tau"] is None
    if lacks_tau and find_tau is None:
        raise missing_tau(file, section["hidden_size"])
    if not lacks_tau and find_tau is not None:
        problem = "the router needs no threshold, or the file or --tau names one"
        raise UserError("--calibrate", problem, "leave it out")
    config = _config(file, run, section | {"router": router | {"tau": 0.5}} if lacks_tau else section, overrides)
    weights = convert(file, config)
    if lacks_tau and find_tau is not None:
        model = build_model(config.model, seed=0, heads=config.heads)
        model.load_state_dict(weights)
        tau = find_tau(model.eval())
        config = _config(file, run, section | {"router": router | {"tau": tau}}, overrides)
    return config, weights


def _config(file: PublishedFile, run: Path, section: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    task = describe_task(file)
    mapping = copy.deepcopy(_OF_CLASSIFIERS if task else _TRAINING)
    mapping |= {"model": section, "task": task}
    mapping["training"]["steps"] = max(file.step, 1)
    mapping["logging"] = {"folder": str(run)}
    trained = file.setting("max_seq_len", int)
    if trained is not None and trained < section["max_sequence_length"]:
        mapping["data"]["sequence_length"] = trained
    return parse_with_overrides(mapping, overrides, str(file.path))


def _notes(file: PublishedFile, options: ImportOptions, config: RunConfig) -> list[str]:
    notes = []
    if options.tau is not None and (said := [file.cfg.get(name) for name in ("tau_low", "tau_high")]) != [None, None]:
        notes.append(f"cfg has tau_low and tau_high {said}; --tau replaces their middle")
    if any(tensor.dtype == torch.float64 for tensor in file.tensors.values()):
        notes.append("weights of 64 bits were rounded to 32")
    if file.cfg.get("use_collapse_reg") is True:
        notes.append("the published regulariser has no gradient, so that model.router.collapse_weight is 0")
    if file.cfg.get("layer_variant") not in (None, "dct_attn"):
        notes.append(f"cfg has layer_variant {file.cfg['layer_variant']!r}, which the published code never reads")
    if config.model.kind == "chiar" and config.model.meta_router.pool == "batch":
        notes.append("the gate of layer 1 averages over the batch: logits depend on the batch, and on later tokens")
    if config.heads:
        notes.append("what fills a sequence up counts as token 0, as in the published training (task.padding: counted)")
    if left_out(file):
        notes.append(
            "the classification heads of mixed training were left out: they read the mean of raw embeddings, "
            "normalised, and no layer"
        )
    return notes
