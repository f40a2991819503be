"""Find the token that ends the documents of a dataset, by its manifest or by its documents.

A dataset that Megatron made has no manifest. Its index says where documents end, but not whether a token of its own
ends them. There the last tokens of some documents, spread over the dataset, are compared. Even if all are the same, the
token may be text (a line break). So it is no reason to mask documents by it, but it refutes another expected token.
"""

from __future__ import annotations

import numpy as np

from megachiar.data.sampling.dataset import TokenSource, token_blocks
from megachiar.data.storage.files import manifest_path
from megachiar.data.storage.manifest import Manifest
from megachiar.data.storage.reader import IndexedDataset

DOCUMENTS_COMPARED = 256
TOKENS_SEARCHED = 1 << 22


def document_end(source: TokenSource) -> int | None:
    """Return the id that ends each document of ``source``; None if they end with no token of their own."""
    if is_recorded(source.manifest):
        return recorded_end(source.manifest)
    return seen_end(source.dataset)


def is_recorded(manifest: Manifest | None) -> bool:
    """Return whether ``manifest`` says how documents end."""
    return manifest is not None and not (manifest.append_eod and manifest.tokenizer.eod_id is None)


def recorded_end(manifest: Manifest | None) -> int | None:
    """Return the id that ends each document, as the manifest says; None if it names none or there is no manifest."""
    return manifest.tokenizer.eod_id if manifest is not None and manifest.append_eod else None


def seen_end(dataset: IndexedDataset) -> int | None:
    """Return the id that all compared documents end with; None if they end with different ones."""
    numbers = np.unique(np.linspace(0, dataset.documents - 1, DOCUMENTS_COMPARED).astype(np.int64))
    spans = ((dataset.token_of_document(n), dataset.token_of_document(n + 1)) for n in numbers.tolist())
    ends = {int(dataset.tokens[end - 1]) for begin, end in spans if end > begin}
    return ends.pop() if len(ends) == 1 else None


def describe_end(source: TokenSource) -> str:
    """Describe how documents end in ``source``, in words such as "a.json says that documents end with id 3"."""
    path, end = manifest_path(source.prefix), document_end(source)
    if is_recorded(source.manifest):
        ending = f"id {end}" if end is not None else "no token of their own (append_eod is false)"
        return f"{path} says that documents end with {ending}"
    lack = "there is no manifest" if source.manifest is None else "the manifest names no end-of-document token"
    ending = f"id {end}" if end is not None else "different tokens"
    return f"{path}: {lack}, and the documents that were compared end with {ending}"


def why_unmasked(source: TokenSource, end: int | None, is_stated: bool) -> str | None:
    """Say why token ``end`` does not keep the documents of ``source`` apart; None if it does.

    Args:
        source: a dataset that is trained on or scored.
        end: the token that is to end every document; None if nothing names one.
        is_stated: whether the user's config names ``end``. If the manifest then names no token, it is enough that
            ``end`` occurs, even inside documents.
    """
    if is_one_document(source):
        return None
    found = document_end(source)
    if end is None:
        return describe_end(source) if is_recorded(source.manifest) else None
    if found == end:
        return None
    if is_stated and recorded_end(source.manifest) is None:
        if _occurs(source, end):
            return None
        return f"{describe_end(source)}, and id {end} does not occur in the tokens that were searched"
    return f"{describe_end(source)}, not with id {end}" if found is not None else describe_end(source)


def is_one_document(source: TokenSource) -> bool:
    """Return whether ``source`` is a single document by its manifest, so that there is no other to keep apart."""
    return source.manifest is not None and source.manifest.documents == 1


def _occurs(source: TokenSource, token: int) -> bool:
    """Return whether ``token`` is among the first ``TOKENS_SEARCHED`` tokens, spread over the dataset."""
    return any((block == token).any() for block in token_blocks(source, TOKENS_SEARCHED))
