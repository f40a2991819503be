"""Check which token ends a document in every dataset of a run.

With ``data.document_mask`` all datasets must agree on the token. Without it the log names the datasets that differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megachiar.config import RunConfig
from megachiar.data.sampling.document_end import document_end, is_one_document, is_recorded, recorded_end, why_unmasked
from megachiar.data.sampling.history import DataHistory
from megachiar.data.storage.files import manifest_path
from megachiar.data.storage.manifest import read_manifest
from megachiar.errors import UserError
from megachiar.topology import LaunchError
from megachiar.training.run_data import RunData


def with_document_end(config: RunConfig, data: RunData) -> RunConfig:
    """Return ``config`` with ``data.document_end`` set where ``data.document_mask`` keeps attention within documents.

    Raises:
        LaunchError: nothing names the token that ends a document, or that token does not end the documents of every
            training and validation set.
    """
    if not config.data.document_mask:
        return config
    stated = config.data.document_end
    end, named_by = (stated, "data.document_end") if stated is not None else _known_end(data)
    try:
        reasons = [why_unmasked(source, end, is_stated=stated is not None) for source in data.sources]
    except UserError as error:  # an id is above the vocabulary: every rank finds it
        raise LaunchError(error.where, error.problem, error.remedy) from error
    problems = [reason for reason in reasons if reason is not None]
    if problems:
        what = "is true" if end is None else f"is true and {named_by} says that documents end with id {end}"
        raise LaunchError("data.document_mask", f"{what}, but {'; '.join(problems)}", _remedy(end, stated is not None))
    if end is None:
        raise LaunchError(
            "data.document_mask",
            f"is true, but neither a manifest of {data.sources[0].prefix} nor a tokenizer says which token ends a "
            "document",
            "set data.document_end",
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"document_end": end})})


def _remedy(end: int | None, is_stated: bool) -> str:
    preprocess = "preprocess it with --append-eod"
    if end is not None:
        preprocess += f" and the --eod-token that has id {end}"
    name = "" if is_stated else "name the token that stands between its documents in data.document_end, "
    return f"{preprocess}, {name}leave it out, or set data.document_mask to false"


def _known_end(data: RunData) -> tuple[int | None, str]:
    """Return the token that ends a document, and the file that names it: the first manifest or else the tokenizer."""
    for source in data.sources:
        if (end := recorded_end(source.manifest)) is not None:
            return end, str(manifest_path(source.prefix))
    return (data.tokenizer.eod_id, str(data.tokenizer.path)) if data.tokenizer is not None else (None, "")


def describe_document_ends(data: RunData) -> list[str]:
    """Return a line for the log where the datasets of a run end documents with different tokens.

    Datasets that the run read earlier count too, as long as they are still in their place.
    """
    groups: dict[int | None, list[str]] = {}
    for source in data.sources:
        if not is_one_document(source):
            groups.setdefault(document_end(source), []).append(str(source.prefix))
    for path, end in _earlier_ends(data.history):
        groups.setdefault(end, []).append(f"{path} (read earlier)")
    if len(groups) <= 1:
        return []
    parts = [
        f"{', '.join(names)} with {'no token of their own' if end is None else f'id {end}'}"
        for end, names in groups.items()
    ]
    return [f"documents end differently: {'; '.join(parts)}"]


def _earlier_ends(history: DataHistory) -> Iterator[tuple[str, int | None]]:
    """Yield path and recorded end-of-document id of each source that the run has read earlier and no longer reads."""
    current = {share.source for share in history.orders[-1].shares}
    for number, record in enumerate(history.sources):
        if number in current:
            continue
        with contextlib.suppress(UserError):  # another file is in its place by now
            manifest = read_manifest(record.path)
            if manifest is not None and manifest.content == record.checksum and is_recorded(manifest):
                yield record.path, recorded_end(manifest)
