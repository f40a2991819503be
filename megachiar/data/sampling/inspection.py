"""Inspect a dataset: its content, whether it fits its manifest, and the text of a document or sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megachiar.data.sampling.dataset import SampleStream, build_training_samples
from megachiar.data.sampling.megatron_order import MegatronStream
from megachiar.data.storage.files import bin_path, idx_path, manifest_path
from megachiar.data.storage.manifest import Manifest, check_manifest, read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.tokenizers.recorded import find_recorded, load_as_recorded
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError

SCAN_BLOCK = 1 << 22  # tokens that are scanned at once


def summarise(
    prefix: Path | str, *, verify: bool = False, on_bytes: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Describe the content of a dataset, as values that JSON can represent.

    Args:
        prefix: the path of the dataset without ``.bin``.
        verify: whether to read both files whole and check every row of the index, every id, and the checksums.
        on_bytes: called with the number of bytes of each read while verifying.

    Returns:
        ``files`` (path and bytes), ``dtype``, counts, ``document_tokens`` (smallest, mean, median, largest document),
        ``manifest`` (None without one), ``verified`` (the checks that were made) and ``not_checked`` (those that were
        not, and why).

    Raises:
        UserError: the dataset is damaged or does not fit its manifest.
    """
    dataset, manifest = IndexedDataset(prefix), read_manifest(prefix)
    summary: dict[str, Any] = {
        "prefix": str(prefix),
        "files": {str(path): path.stat().st_size for path in (bin_path(prefix), idx_path(prefix))},
        "dtype": dataset.dtype.name,
        "documents": dataset.documents,
        "sequences": len(dataset),
        "tokens": int(dataset.tokens.size),
        "document_tokens": _document_sizes(dataset),
        "manifest": manifest.to_dict() if manifest else None,
        "verified": ["header", "sizes", "counts"],
        "not_checked": [],
    }
    if manifest is not None:
        check_manifest(prefix, manifest, dataset, verify=verify, on_bytes=on_bytes)
    if verify:
        dataset.check_index()
        summary["verified"].append("index")
        summary.update(_scan_ids(dataset))
        _check_ids(prefix, manifest, summary)
        if manifest is not None:
            summary["verified"].append("checksums")
    summary["not_checked"] = _not_checked(manifest, verify)
    if not dataset.tells_documents:
        reason = "the index does not say it (GPT-NeoX's merge loses it); each sequence counts as one"
        summary["not_checked"].append(f"where documents begin: {reason}")
    return summary


def _document_sizes(dataset: IndexedDataset) -> dict[str, float]:
    """Return how many tokens the smallest, mean, median and largest document have."""
    starts = dataset.document_starts
    ends_in_tokens = np.append(dataset.pointers // dataset.dtype.itemsize, dataset.tokens.size)
    sizes = np.diff(ends_in_tokens[starts])
    return {
        "smallest": int(sizes.min()),
        "mean": float(sizes.mean()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
    }


def _scan_ids(dataset: IndexedDataset) -> dict[str, Any]:
    """Return the smallest and largest id that occur; nothing for a dataset of floats, which holds no ids."""
    if dataset.dtype.kind not in "iu":
        return {}
    tokens = dataset.tokens
    blocks = [tokens[first : first + SCAN_BLOCK] for first in range(0, tokens.size, SCAN_BLOCK)]
    return {
        "smallest_token_id": min(int(block.min()) for block in blocks),
        "largest_token_id": max(int(block.max()) for block in blocks),
    }


def _check_ids(prefix: Path | str, manifest: Manifest | None, found: Mapping[str, Any]) -> None:
    """Refuse negative ids, and a largest id that is not the manifest's."""
    if found.get("smallest_token_id", 0) < 0:
        raise UserError(bin_path(prefix), f"holds the id {found['smallest_token_id']}", "preprocess again")
    if manifest is not None and found.get("largest_token_id") != manifest.largest_token_id:
        raise UserError(
            manifest_path(prefix),
            f"records largest_token_id {manifest.largest_token_id}, but the file holds {found.get('largest_token_id')}",
            "preprocess again",
        )


def _not_checked(manifest: Manifest | None, verify: bool) -> list[str]:
    """List the checks that were not made, and why."""
    missing = []
    if not verify:
        missing.append("every row of the index, and the tokens themselves: pass --verify to read the files whole")
    if manifest is None:
        missing.append("checksums, tokenizer and text: there is no manifest (the dataset was made by another program)")
    return missing


def find_tokenizer(prefix: Path | str, given: Path | None) -> Tokenizer | None:
    """Load the tokenizer of a dataset: ``given``, or the one that its manifest names, if it still exists.

    Returns:
        The tokenizer; None if nothing is given and the manifest names none that exists.

    Raises:
        UserError: it is not the one that the dataset was made with.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return None if given is None else load_tokenizer(given)
    path = given or find_recorded(prefix, manifest)
    return None if path is None else load_as_recorded(path, manifest.tokenizer, manifest_path(prefix))


def show_document(prefix: Path | str, number: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the ids and, with a tokenizer, the text of document ``number``.

    Raises:
        UserError: there is no such document.
    """
    dataset = IndexedDataset(prefix)
    if not 0 <= number < dataset.documents:
        raise UserError(
            idx_path(prefix), f"there is no document {number}", f"documents are 0 to {dataset.documents - 1}"
        )
    ids = dataset.document(number).tolist()
    return {"document": number, "first_token": dataset.token_of_document(number), **_as_text(ids, tokenizer)}


def show_sample(
    prefix: Path | str, number: int, sequence_length: int, seed: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return location, documents, ids and, with a tokenizer, text of sample ``number`` of a run on this dataset alone.

    Raises:
        UserError: the number or the sequence length is out of range, or the dataset cannot be trained on.
    """
    if number < 0 or sequence_length < 1:
        raise UserError(
            prefix, f"sample {number} of sequence length {sequence_length}", "give 0 or more, and 1 or more"
        )
    stream = build_training_samples([(prefix, 1.0)], sequence_length, seed)
    (location,) = stream.locate([number])
    ids = stream.sample(number)
    dataset = stream.sources[location.source].dataset
    last = (location.token + ids.size - 1) % stream.sources[location.source].tokens.size
    return {
        "sample": number,
        "epoch": location.epoch,
        "first_token": location.token,
        "first_document": dataset.document_of_token(location.token),
        "last_document": dataset.document_of_token(last),
        **_as_text(ids.tolist(), tokenizer),
    }


def show_samples(
    stream: SampleStream | MegatronStream, positions: range, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """Return position, source, epoch, documents, ids and text of each sample that a run reads at ``positions``."""
    samples = []
    for position, location, ids in zip(positions, stream.locate(positions), stream.batch(positions), strict=True):
        samples.append(
            {
                "position": position,
                "source": str(stream.sources[location.source].prefix),
                "epoch": location.epoch,
                "first_token": location.token,
                "documents": ", ".join(map(str, stream.documents(position))),
                **_as_text(ids.tolist(), tokenizer),
            }
        )
    return samples


def _as_text(ids: list[int], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the number of ids, the ids, and their text, which is None without a tokenizer."""
    return {"tokens": len(ids), "ids": ids, "text": None if tokenizer is None else tokenizer.decode(ids)}
