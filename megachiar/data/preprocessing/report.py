"""Report the result of a run of preprocessing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megachiar.data.inputs.documents import InvalidDocumentLog
from megachiar.data.inputs.folder_files import FoundFiles
from megachiar.data.preprocessing.existing import SAME
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.storage.labels import read_labels
from megachiar.data.storage.manifest import Manifest
from megachiar.data.tokenizers.edge_tokens import SETTINGS_FILE
from megachiar.data.tokenizers.ready_made import READY_MADE
from megachiar.data.tokenizers.tokenizer import ReferenceTokenizer, Tokenizer


@dataclass
class Report:
    """Hold the results of a run.

    Attributes:
        manifests: prefix -> manifest of each dataset written.
        log: the documents left out.
        seconds: the time from the first byte read to the last one on the disk.
        engine: the encoder, and the reason for its choice; empty if an earlier run had encoded everything.
        rate: megabytes of text a second that this run itself encoded.
        found: the files that folders and globs among the inputs gave.
        source_records: a record of each input, see ``source_records``; empty where the datasets existed.
        document_beginning: a sentence that says what documents begin with; empty where it is their text.
        document_end: a sentence that says how documents end.
        unknown_id: the id of the unknown token, for text that the vocabulary lacks; None where there is none.
        unknown_tokens: prefix -> how often that token occurs; None where an earlier version, which did not count it,
            began the run.
        existed: whether the datasets existed already, as this call makes them, so that nothing was done.
    """

    manifests: dict[Path, Manifest] = field(default_factory=dict)
    log: InvalidDocumentLog = field(default_factory=InvalidDocumentLog)
    seconds: float = 0.0
    engine: str = ""
    rate: float = 0.0
    found: list[FoundFiles] = field(default_factory=list)
    source_records: list[list[Any]] = field(default_factory=list)
    document_beginning: str = ""
    document_end: str = ""
    unknown_id: int | None = None
    unknown_tokens: dict[Path, int | None] = field(default_factory=dict)
    existed: bool = False

    @classmethod
    def of_existing(cls, manifests: dict[Path, Manifest]) -> Report:
        """Report on datasets that existed already."""
        made = next(iter(manifests.values()))
        log = InvalidDocumentLog("skip", Counter(made.skipped), replaced=made.replaced)
        return cls(manifests, log, existed=True)

    def lines(self) -> Iterator[str]:
        """Yield the report as text, line by line."""
        for found in self.found:
            yield found.summary()
        for invalid in self.log.examples:
            yield f"skipped {invalid.where}: {invalid.problem} [{invalid.kind}]"
        for prefix, made in self.manifests.items():
            text = "" if made.tokenizer.kind == READY_MADE else f", {_describe_text(made)}{self._unknown(prefix)}"
            yield f"{prefix}.bin/.idx: {made.documents:,} documents, {made.tokens:,} tokens ({made.dtype}){text}"
            if made.labels is not None:
                yield f"{prefix}.labels.npy: {read_labels(prefix, made, made.documents).describe()}"
        yield from filter(None, (self.document_beginning, self.document_end))
        if self.log.replaced:
            yield f"documents in which bytes that are not UTF-8 were replaced: {self.log.replaced:,}"
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.log.counts.items())) or "none"
        if self.existed:
            yield f"skipped documents: {left_out}"
            yield f"{', '.join(map(str, self.manifests))}: {SAME}"
            return
        yield f"skipped documents: {left_out}; {self.seconds:.1f} s, {self.rate:.2f} MB/s"
        if self.engine:
            yield f"engine: {self.engine}"

    def _unknown(self, prefix: Path) -> str:
        """Return text such as ``, 12 <unk> (id 0)``; nothing where the datasets were not made by this call."""
        if self.existed:
            return ""
        if self.unknown_id is None:
            return ", no <unk> in the vocabulary"
        count = self.unknown_tokens.get(prefix)
        number = "uncounted (an earlier version began this run)" if count is None else f"{count:,}"
        return f", {number} <unk> (id {self.unknown_id})"


def _describe_text(made: Manifest) -> str:
    """Describe the text of a dataset."""
    ratio = made.tokens / max(1, made.text_bytes)
    return f"{made.text_bytes:,} bytes, {made.words:,} words, {ratio:.4f} tokens/byte"


def describe_document_beginning(tokenizer: Tokenizer) -> str:
    """Describe the token that documents begin with; nothing where they begin with their text."""
    if tokenizer.bos_id is None:
        return ""
    return f"each document begins with {tokenizer.controls[tokenizer.bos_id]!r} (id {tokenizer.bos_id})"


def describe_document_end(tokenizer: ReferenceTokenizer, settings: PreprocessSettings) -> str:
    """Describe how documents end: the token and its id, or that there is none; of labelled documents the parts."""
    if settings.read.second_text_key is not None and tokenizer.eod_id is not None:
        return f"{tokenizer.controls[tokenizer.eod_id]!r} (id {tokenizer.eod_id}) stands between the two texts"
    if settings.labelled or tokenizer.kind == READY_MADE:
        return ""
    if tokenizer.eod_id is None:
        return "documents end with no token of their own: the tokenizer has none for it (--eod-token names one)"
    token = f"{tokenizer.controls[tokenizer.eod_id]!r} (id {tokenizer.eod_id}{_named_by(tokenizer)})"
    if settings.append_eod:
        return f"each document ends with {token}"
    return f"documents end with no token: --append-eod adds {token}"


def _named_by(tokenizer: ReferenceTokenizer) -> str:
    """Return text such as ``, eos_token of tokenizer_config.json``; nothing where user or tokenizer name the token."""
    return f", {tokenizer.eod_named_by}" if tokenizer.eod_named_by.endswith(SETTINGS_FILE) else ""
