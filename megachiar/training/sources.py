"""The data of a run, opened and checked against its config before any rank waits for another."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from megachiar.config import RunConfig
from megachiar.data.dataset import (
    SampleStream,
    SourceUse,
    TokenSource,
    ValidationSet,
    check_same_tokenizer,
    open_sources,
)
from megachiar.data.manifest import check_tokenizer, read_manifest
from megachiar.data.megatron_order import MegatronStream
from megachiar.data.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError, disk_errors
from megachiar.topology import LaunchError
from megachiar.training.checkpoint import DataRecord

EPOCHS_WORTH_REPORTING = 4


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        training: its samples by position.
        validation: by name.
        records: the sources as checkpoints refer to them.
        tokenizer: None where neither config nor manifest names one.
    """

    training: SampleStream | MegatronStream
    validation: dict[str, ValidationSet]
    records: list[DataRecord]
    tokenizer: Tokenizer | None


def open_data(config: RunConfig) -> RunData:
    """Open every dataset of ``config``.

    Raises:
        LaunchError: one of them is missing, damaged, too short, or of another vocabulary than the model or the others.
    """
    try:
        vocab_size, length = config.model.vocab_size, config.sequence_length
        sources = [(source.path, source.weight) for source in config.data.train]
        training = _in_order(config, open_sources([path for path, _ in sources], vocab_size))
        validation = {
            name: ValidationSet(prefix, length, vocab_size=vocab_size)
            for name, prefix in config.data.validation.items()
        }
        everything = [*training.sources, *(v.source for v in validation.values())]
        check_same_tokenizer([(source.prefix, source.manifest) for source in everything])
        tokenizer = find_tokenizer(config, training)
        _refuse_too_small(config, training)
    except UserError as error:  # every rank reads the same files
        raise LaunchError(error.where, error.problem, error.remedy) from error
    records = [
        DataRecord(
            tokens=source.dataset.tokens.size,
            checksum=source.manifest.content if source.manifest else None,
            weight=weight,
        )
        for source, (_, weight) in zip(training.sources, sources, strict=True)
    ]
    return RunData(training, validation, records, tokenizer)


def _in_order(config: RunConfig, sources: list[TokenSource]) -> SampleStream | MegatronStream:
    """The samples of a run in the order that ``data.order`` names."""
    weights, seed = [source.weight for source in config.data.train], config.training.seed
    if config.data.order == "keyed":
        return SampleStream(sources, weights, config.sequence_length, seed)
    samples = config.training.steps * config.training.global_batch_size
    return MegatronStream(sources, weights, config.sequence_length, seed, samples)


def _refuse_too_small(config: RunConfig, training: SampleStream | MegatronStream) -> None:
    limit = config.data.max_epochs
    for use in source_uses(config, training):
        if limit is not None and use.epochs > limit:
            raise UserError(
                f"data.train {use.prefix}",
                f"{use.tokens:,} tokens at {use.share:.1%} of the samples are passed over {use.epochs:.2f} times, more "
                f"than data.max_epochs {limit:g}",
                f"give it at most {limit / use.epochs:.3f} of its share, add text, or train for fewer steps",
            )


def source_uses(config: RunConfig, training: SampleStream | MegatronStream) -> list[SourceUse]:
    """What the whole run takes from each source."""
    return training.describe(config.training.steps * config.training.global_batch_size)


def describe_uses(config: RunConfig, training: SampleStream | MegatronStream) -> list[str]:
    """A line for each source; what is passed over too often says so."""
    lines = []
    for use in source_uses(config, training):
        line = f"{use.prefix}: {use.tokens:,} tokens, {use.share:.1%} of samples, {use.epochs:.2f} epochs"
        if config.data.max_epochs is None and use.epochs > EPOCHS_WORTH_REPORTING:
            line += " (small for its weight: repeated text teaches ever less)"
        lines.append(line)
    return lines


def find_tokenizer(config: RunConfig, training: SampleStream | MegatronStream) -> Tokenizer | None:
    """The tokenizer that ``data.tokenizer`` or the first source's manifest names; None if there is neither.

    Raises:
        UserError: the one in the config is missing, has more ids than the model, or did not make the datasets.
    """
    manifest = training.sources[0].manifest
    path = config.data.tokenizer or recorded_tokenizer(training.sources[0].prefix)
    if path is None:
        return None
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer {path}",
            f"has {tokenizer.vocab_size:,} ids, but model.vocab_size is {config.model.vocab_size:,}",
            f"set model.vocab_size to at least {tokenizer.vocab_size:,}",
        )
    if manifest is not None:
        check_tokenizer(training.sources[0].prefix, manifest, tokenizer.fingerprint)
    return tokenizer


def with_document_end(config: RunConfig, data: RunData) -> RunConfig:
    """``config`` with the token that ends a document, where attention is to keep to documents.

    Raises:
        LaunchError: nothing names it, or the dataset was made without it.
    """
    if not config.data.document_mask or config.data.document_end is not None:
        return config
    source = data.training.sources[0]
    if source.manifest is not None and not source.manifest.append_eod:
        problem, remedy = f"is true, but documents of {source.prefix} end with no token of their own", "--append-eod"
        raise LaunchError("data.document_mask", problem, f"preprocess it with {remedy}, or set data.document_end")
    end = source.manifest.tokenizer.eod_id if source.manifest is not None else None
    if end is None and data.tokenizer is not None:
        end = data.tokenizer.eod_id
    if end is None:
        raise LaunchError(
            "data.document_mask",
            f"is true, but neither a manifest of {source.prefix} nor a tokenizer says which token ends a document",
            "set data.document_end",
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"document_end": end})})


def recorded_tokenizer(prefix: Path) -> Path | None:
    """Where the tokenizer that dataset ``prefix`` was made with is now: as recorded, or beside it; None if nowhere."""
    manifest = read_manifest(prefix)
    if manifest is None:
        return None
    recorded = manifest.tokenizer.file
    candidates = (prefix.parent / recorded, prefix.parent / Path(recorded).name)
    return next((path for path in candidates if path.exists()), None)


def keep_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    """Copy the tokenizer's file or folder into the run folder, so that the run can be sampled from by itself."""
    if tokenizer is None:
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(tokenizer.path)
        if source.is_dir():
            shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
        else:
            shutil.copy2(source, folder / source.name)
