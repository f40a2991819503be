"""Hold a dataset while a run of preprocessing writes it, with the counts of its text for the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megachiar import __version__
from megachiar.data.inputs.documents import InvalidDocumentLog
from megachiar.data.preprocessing.classes import ClassTable
from megachiar.data.preprocessing.encoder import EncodedPart
from megachiar.data.preprocessing.input_note import ENTRIES
from megachiar.data.preprocessing.journal import OutputState
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.storage.label_writer import LabelsBuilder
from megachiar.data.storage.manifest import LabelsRecord, Manifest
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.data.tokenizers.recorded import describe_tokenizer
from megachiar.data.tokenizers.tokenizer import Tokenizer


@dataclass
class Output:
    """Hold a dataset that is being written, and count its text for the manifest.

    Attributes:
        prefix: the path of the dataset; until its documents are shuffled they are written elsewhere.
        builder: the writer.
        text_bytes: the UTF-8 bytes of the text so far.
        words: the whitespace-separated words of the text so far.
        unknown_tokens: the number of unknown tokens so far, for text that the vocabulary lacks; None where an earlier
            version began this run and did not count them.
        labels: the writer of the labels; None without labels.
        classes: the classes of the labels, which all outputs of a run share; None without labels.
    """

    prefix: Path
    builder: IndexedDatasetBuilder
    text_bytes: int = 0
    words: int = 0
    unknown_tokens: int | None = 0
    labels: LabelsBuilder | None = None
    classes: ClassTable | None = None

    @classmethod
    def from_state(
        cls,
        prefix: Path,
        builder: IndexedDatasetBuilder,
        state: OutputState | None,
        classes: ClassTable | None = None,
    ) -> Output:
        """Return an output with the counts of ``state``; without a state they are 0.

        Args:
            prefix: the path of the dataset.
            builder: its writer, whose prefix the labels have too.
            state: how far an earlier run had come, which the builder continues.
            classes: of the labels; None without labels.
        """
        output = cls(prefix, builder, classes=classes)
        if state is not None:
            output.text_bytes, output.words = state.text_bytes, state.words
            output.unknown_tokens = state.unknown_tokens
        if classes is not None:
            continued = state.labels if state is not None and builder.documents else None
            try:
                output.labels = LabelsBuilder(builder.prefix, continued)
            except BaseException:
                builder.close()
                raise
        return output

    def add(self, part: EncodedPart) -> None:
        """Write the documents of ``part``."""
        if part.lengths.size:
            self.builder.add_documents(part.tokens, part.lengths)
        if self.labels is not None and self.classes is not None:
            self.labels.add(self.classes.numbers_of(part.labels))
        self.text_bytes += part.text_bytes
        self.words += part.words
        if self.unknown_tokens is not None:
            self.unknown_tokens += part.unknown_tokens

    def state(self) -> OutputState:
        """Return how far this output has come; all that was added until now survives a kill or a power cut."""
        labels = None if self.labels is None else self.labels.state()
        return OutputState(self.builder.state(), self.text_bytes, self.words, self.unknown_tokens, labels)

    def complete_labels(self) -> None:
        """Complete the file of the labels, if there are any: all classes are known by now."""
        if self.labels is not None and self.classes is not None and self.builder.tokens:
            self.labels.complete(self.classes.renumbering())

    def close(self) -> None:
        """Close the files, which stay where they are."""
        self.builder.close()
        if self.labels is not None:
            self.labels.close()

    def abort(self) -> None:
        """Remove all that was written."""
        self.builder.abort()
        if self.labels is not None:
            self.labels.abort()

    def labels_record(self) -> LabelsRecord | None:
        """Return what the manifest says of the labels, whose file is complete; None without labels."""
        if self.labels is None or self.classes is None:
            return None
        return LabelsRecord(classes=self.classes.classes, checksums=self.labels.checksums)


def make_manifest(
    settings: PreprocessSettings,
    tokenizer: Tokenizer,
    output: Output,
    log: InvalidDocumentLog,
    records: Sequence[Sequence[Any]],
) -> Manifest:
    """Return the manifest of an output whose files are complete.

    Args:
        settings: of the run.
        tokenizer: the tokenizer that made the tokens.
        output: the output.
        log: the documents left out.
        records: a record of each source, see ``source_records``.
    """
    builder = output.builder
    known = records if all(len(record) == ENTRIES for record in records) else []  # an earlier version began the run
    return Manifest(
        tokenizer=describe_tokenizer(tokenizer, output.prefix.parent),
        dtype=builder.dtype.name,
        append_eod=settings.append_eod,
        documents=builder.documents,
        tokens=builder.tokens,
        text_bytes=output.text_bytes,
        words=output.words,
        skipped=dict(sorted(log.counts.items())),
        replaced=log.replaced,
        largest_token_id=builder.largest_token_id,
        checksums=builder.checksums,
        shuffle_seed=settings.shuffle_seed,
        sources=[source.name for source in settings.sources],
        source_bytes=[size for _, size, *_ in known],
        source_checksums=[record[-1] for record in known],
        options=settings.determining_options,
        labels=output.labels_record(),
        created_by=f"megachiar {__version__} preprocess_data",
    )
