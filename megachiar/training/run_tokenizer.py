"""Find the tokenizer of a run when it starts, compare it when it continues, and load it when the run is read.

The manifests of the run's data record which tokenizer made them. The run folder keeps a copy of the tokenizer's files
and of that record.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from megachiar.checkpoint.compatibility import weights_alone
from megachiar.checkpoint.format import CONFIG_FILE
from megachiar.config import RunConfig, load_config
from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.storage.files import manifest_path
from megachiar.data.storage.manifest import Manifest, TokenizerRecord, read_manifest
from megachiar.data.tokenizers.recorded import (
    KEPT_FOLDER,
    KEPT_RECORD,
    describe_tokenizer,
    find_recorded,
    load_as_recorded,
    manifest_of_tokenizer,
    read_kept_record,
)
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError
from megachiar.topology import LaunchError


def find_tokenizer(config: RunConfig, sources: Sequence[TokenSource]) -> Tokenizer | None:
    """Load the tokenizer that ``data.tokenizer`` or the first manifest among ``sources`` names.

    Its kind and its end-of-document token are those that the manifest records.

    Returns:
        The tokenizer, or None if neither config nor manifest names one that is still there.

    Raises:
        UserError: the config's tokenizer is missing, has more ids than the model, or did not make the datasets.
    """
    known = manifest_of_tokenizer((source.prefix, source.manifest) for source in sources)
    path = config.data.tokenizer or (find_recorded(*known) if known is not None else None)
    if path is None:
        return None
    if known is None:
        tokenizer: Tokenizer = load_tokenizer(path)
    else:
        prefix, manifest = known
        tokenizer = load_as_recorded(path, manifest.tokenizer, manifest_path(prefix))
    _check_fits(tokenizer, f"data.tokenizer {path}", config.model.vocab_size)
    return tokenizer


def record_of_data(sources: Sequence[TokenSource], tokenizer: Tokenizer | None) -> TokenizerRecord | None:
    """Return the tokenizer's record in the first manifest of ``sources``, or else one that describes ``tokenizer``."""
    known = manifest_of_tokenizer((source.prefix, source.manifest) for source in sources)
    if known is not None:
        return known[1].tokenizer
    return describe_tokenizer(tokenizer, Path()) if tokenizer is not None else None


def check_kept_tokenizer(checkpoint: Path, now: TokenizerRecord | None, is_own: bool) -> None:
    """Check that a run which continues from ``checkpoint`` reads data of the tokenizer that the run folder keeps.

    Args:
        checkpoint: of the run.
        now: record of the tokenizer that made the data; None where nothing records it.
        is_own: as ``checkpoint.compatibility.read_compatible``.

    Raises:
        LaunchError: another tokenizer made the data, so that every id would change its meaning.
    """
    run = checkpoint.parent.parent
    kept = read_kept_record(run)
    if kept is not None and now is not None and kept.fingerprint != now.fingerprint:
        raise LaunchError(
            run / KEPT_RECORD,
            f"the run was trained with tokenizer {kept.file} ({kept.fingerprint}), but its data is now made with "
            f"{now.file} ({now.fingerprint})",
            f"continue with data of the run's tokenizer, or {weights_alone(checkpoint, is_own)}",
        )


def describe_other_tokenizer(checkpoint: Path, now: TokenizerRecord | None) -> list[str]:
    """Return a line for the log where a new run loads weights that were trained with another tokenizer than ``now``.

    Raises:
        UserError: the config or the record beside the checkpoint is damaged.
    """
    before = record_of_run(checkpoint, load_config(checkpoint / CONFIG_FILE))
    if before is None or now is None or before.fingerprint == now.fingerprint:
        return []
    return [
        f"{checkpoint} was trained with another tokenizer ({before.file}) than the data ({now.file}): "
        "its ids mean other tokens here"
    ]


def record_of_run(checkpoint: Path, config: RunConfig) -> TokenizerRecord | None:
    """Return the record of the tokenizer that the run of ``checkpoint`` was trained with; None if nothing records it.

    An older run folder keeps no record. The first manifest of its data that is still there stands in for it.
    """
    kept = read_kept_record(checkpoint.parent.parent)
    if kept is not None:
        return kept
    known = _manifest_of_run(config)
    return known[1].tokenizer if known is not None else None


def run_tokenizer(checkpoint: Path, config: RunConfig) -> Tokenizer:
    """Load the tokenizer of the run that wrote ``checkpoint``: its own copy, or the one that its config or data names.

    Its kind and its end-of-document token are those that the run folder, or else a manifest of its data, records.

    Raises:
        UserError: no tokenizer of the run is left, or another one is in its place.
    """
    run = checkpoint.parent.parent
    kept = read_kept_record(run)
    path = next((path for path in _candidates(run, kept, config) if os.path.exists(path)), None)
    if path is None:
        raise UserError(
            checkpoint,
            "no tokenizer of this run was found",
            f"put its file into {run / KEPT_FOLDER}, or set data.tokenizer",
        )
    if kept is not None:
        tokenizer = load_as_recorded(path, kept, run / KEPT_RECORD)
    else:
        tokenizer = _load_of_older_run(path, record_of_run(checkpoint, config), checkpoint)
    _check_fits(tokenizer, path, config.model.vocab_size)
    return tokenizer


def _candidates(run: Path, kept: TokenizerRecord | None, config: RunConfig) -> list[Path]:
    """Return paths where the tokenizer of a run may be, the best one first."""
    if kept is not None:
        candidates = [run / kept.file]
    else:
        folder = run / KEPT_FOLDER
        candidates = sorted(folder.iterdir()) if folder.is_dir() else []
        if len(candidates) > 1:  # these are the files of one tokenizer, which is named by their folder
            candidates = [folder]
    if config.data.tokenizer is not None:
        candidates.append(config.data.tokenizer)
    known = _manifest_of_run(config)
    named = find_recorded(*known) if known is not None else None
    return [*candidates, named] if named is not None else candidates


def _load_of_older_run(path: Path, recorded: TokenizerRecord | None, checkpoint: Path) -> Tokenizer:
    """Load the tokenizer at ``path`` as ``recorded`` says, or without the record if it is of another tokenizer.

    A copy in the run folder is trusted more than a manifest of the data.
    """
    if recorded is not None:
        with contextlib.suppress(UserError):
            return load_as_recorded(path, recorded, checkpoint)
    return load_tokenizer(path)


def _manifest_of_run(config: RunConfig) -> tuple[Path, Manifest] | None:
    """Return prefix and manifest of the first dataset of ``config`` whose manifest is still there."""
    return manifest_of_tokenizer((prefix, read_manifest(prefix)) for prefix in config.data.prefixes)


def _check_fits(tokenizer: Tokenizer, where: object, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            where,
            f"has {tokenizer.vocab_size:,} ids, but model.vocab_size is {vocab_size:,}",
            f"set model.vocab_size to at least {tokenizer.vocab_size:,}",
        )
