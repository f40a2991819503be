"""Carry out one run of preprocessing; it continues an earlier run of the same call where that was stopped.

encoding    the inputs that are missing go through the workers to the outputs   (checkpoints between inputs)
shuffling   the documents of each output get their new order                    (only with a shuffle seed)
placing     the complete files get their final names
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from megachiar.data.inputs.chunk_groups import ChunkGroup, read_groups
from megachiar.data.inputs.documents import Document, InvalidDocumentLog, ReadOptions
from megachiar.data.inputs.parsing import parse_chunk
from megachiar.data.inputs.source import Source, no_document
from megachiar.data.inputs.source_reading import SourceRecorder
from megachiar.data.preprocessing.classes import ClassTable
from megachiar.data.preprocessing.encoder import ChunkEncoder, EncodedGroup, with_controls
from megachiar.data.preprocessing.input_note import write_input_note
from megachiar.data.preprocessing.journal import Journal, OutputState, Stage
from megachiar.data.preprocessing.ordered_pool import ordered_map
from megachiar.data.preprocessing.output import Output, make_manifest
from megachiar.data.preprocessing.report import Report, describe_document_beginning, describe_document_end
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shuffle import shuffle_documents, shuffled_order, unshuffled
from megachiar.data.storage.files import (
    CHECKSUM_BLOCK,
    as_bytes,
    bin_path,
    block_checksums,
    dataset_files,
    idx_path,
    put_in_place,
    remove_dataset,
)
from megachiar.data.storage.index_format import dtype_for_vocabulary
from megachiar.data.storage.labels import read_numbers
from megachiar.data.storage.manifest import VERIFYING_THREADS, Manifest, read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import BuilderState, IndexedDatasetBuilder
from megachiar.data.tokenizers.fast import CHECKED_BYTES, EngineChoice, choose_engine
from megachiar.data.tokenizers.pieces import MOST_CACHED_BYTES
from megachiar.data.tokenizers.ready_made import READY_MADE
from megachiar.data.tokenizers.tokenizer import ReferenceTokenizer
from megachiar.errors import UserError, disk_errors
from megachiar.process_memory import give_back_free_memory
from megachiar.progress import MEGA, TextProgress

GROUPS_BETWEEN_FREEING = 64  # groups after which this process returns its free memory to the system


class PreprocessRun:
    """Carry out one run of preprocessing, from the stage that the journal records.

    Attributes:
        settings: of the run.
        tokenizer: the tokenizer as its own library encodes.
        journal: the record of the finished work.
        stream: where progress is shown.
        dtype: the type of the tokens.
        engine: the encoder, and the reason for its choice; None if nothing is left to encode.
        made: the manifest of each dataset that this run completed.
        done_before: how many inputs earlier runs had done.
        recorder: makes a record of each input that this run reads.
        classes: the classes of labelled documents; None without labels.
    """

    def __init__(self, settings: PreprocessSettings, tokenizer: ReferenceTokenizer, journal: Journal, stream: TextIO):
        self.settings = settings
        self.tokenizer = tokenizer
        self.journal = journal
        self.stream = stream
        self.dtype = dtype_for_vocabulary(tokenizer.vocab_size)
        self.engine: EngineChoice | None = None
        self.made: dict[Path, Manifest] = {}
        self.done_before = len(journal.sources)
        self.recorder = SourceRecorder()
        self.classes = ClassTable(settings.classes, journal.classes) if settings.labelled else None

    def run(self) -> Report:
        """Do all that is left to do.

        Raises:
            UserError: ``preprocess`` says when.
        """
        with TextProgress("preprocessing", total_size(self.settings.sources), self.stream) as progress:
            if self.journal.stage == "encoding":
                self._encode(progress)
            if self.journal.stage == "shuffling":
                self._shuffle()
            self._move_outputs()
            unknown = [state.unknown_tokens for state in self.journal.outputs]
            return Report(
                manifests={prefix: self._manifest_of(prefix) for prefix in self.settings.prefixes if _exists(prefix)},
                log=self.journal.log,
                seconds=progress.elapsed,
                engine=f"{self.engine.kind} ({self.engine.reason})" if self.engine else "",
                rate=progress.per_second(progress.text_bytes) / MEGA,
                found=self.settings.found,
                source_records=self.journal.sources,
                document_beginning=describe_document_beginning(self.tokenizer),
                document_end=describe_document_end(self.tokenizer, self.settings),
                unknown_id=self.tokenizer.unknown_id,
                unknown_tokens=dict(zip(self.settings.prefixes, unknown, strict=True)),
            )

    def _encode(self, progress: TextProgress) -> None:
        """Encode the inputs that are missing and complete the outputs."""
        done, shuffling = self.done_before, self.settings.shuffle_seed is not None
        if done:
            progress.advance(total_size(self.settings.sources[:done]) or 0)
            print(f"going on after {done:,} of {len(self.settings.sources):,} inputs, done before", file=self.stream)
        with self._outputs() as outputs:
            log = self._encode_sources(outputs, done, progress)
            self._check_filled(outputs, log)
            for output in outputs:
                output.complete_labels()
            states = [output.state() for output in outputs]
            for output in outputs:
                if output.builder.tokens:
                    output.builder.complete(None if shuffling else functools.partial(self._manifest, output, log))
            stage: Stage = "shuffling" if shuffling else "placing"
            self.journal.checkpoint(self._unrecorded(), states, log, stage, self._found_classes())

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[list[Output]]:
        """Open the outputs of all parts; if the block fails, keep all files that the next run can continue."""
        outputs: list[Output] = []
        states: list[OutputState | None] = [*self.journal.outputs] or [None] * len(self.settings.prefixes)
        try:
            for prefix, state in zip(self.settings.prefixes, states, strict=True):
                first = prefix if self.settings.shuffle_seed is None else unshuffled(prefix)
                builder = IndexedDatasetBuilder(first, self.dtype, state.builder if state else None)
                outputs.append(Output.from_state(prefix, builder, state, self.classes))
            yield outputs
        except BaseException:
            for output in outputs:
                if self.journal.sources:
                    output.close()
                else:
                    output.abort()
            if self.journal.sources:
                total = len(self.settings.sources)
                kept = f"{len(self.journal.sources):,} of {total:,} inputs are done and kept"
                print(f"{kept}: run the same command again to go on", file=self.stream)
            raise
        for output in outputs:
            output.close()
            if not output.builder.tokens:
                output.abort()

    def _encode_sources(self, outputs: list[Output], done: int, progress: TextProgress) -> InvalidDocumentLog:
        """Encode the sources after the first ``done`` ones into ``outputs``, with checkpoints between sources."""
        settings, log = self.settings, self.journal.log
        log.on_error = settings.on_error
        pending: collections.deque[ChunkGroup] = collections.deque()  # groups under way, without their text
        sources = enumerate(settings.sources[done:], done)

        def groups() -> Iterator[ChunkGroup]:
            for group in read_groups(sources, settings.read, self.recorder):
                pending.append(group._replace(chunks=[]))
                yield group

        resumable = all(source.can_be_read_again for source in settings.sources)
        with contextlib.closing(self._encoded(groups())) as results:
            for groups_done, result in enumerate(results, 1):
                group = pending.popleft()
                if groups_done % GROUPS_BETWEEN_FREEING == 0:
                    give_back_free_memory()
                finished = range(len(self.journal.sources), group.first_source)
                # A checkpoint is possible only where a source begins: the next run would read a part of one again.
                if resumable and group.begins_source and finished and self.journal.due():
                    states = [output.state() for output in outputs]
                    unrecorded = self._unrecorded(group.first_source)
                    self.journal.checkpoint(unrecorded, states, log, classes=self._found_classes())
                for output, part in zip(outputs, result.parts, strict=True):
                    output.add(part)
                log.merge(result.log)
                text_bytes = sum(part.text_bytes for part in result.parts)
                progress.advance(result.consumed, text_bytes, sum(part.lengths.size for part in result.parts))
        return log

    def _found_classes(self) -> list[str]:
        """Return the classes that were found so far; none without labels."""
        return [] if self.classes is None else self.classes.found

    def _unrecorded(self, end: int | None = None) -> list[list[Any]]:
        """Return the records of the inputs up to number ``end`` that were read since the last checkpoint."""
        first = len(self.journal.sources) - self.done_before
        return self.recorder.records(first, None if end is None else end - self.done_before)

    def _encoded(self, groups: Iterator[ChunkGroup]) -> Generator[EncodedGroup, None, None]:
        """Choose the engine by the first group, and encode all groups in worker processes, in order."""
        settings = self.settings
        first = list(itertools.islice(groups, 1))
        if self.tokenizer.kind == READY_MADE:
            engine = EngineChoice("reference", "ready-made ids", self.tokenizer)
        else:
            engine = choose_engine(settings.engine, self.tokenizer, _first_texts(first, settings.read))
        self.engine = engine
        make_encoder: Callable[[], ChunkEncoder]
        if settings.fork or settings.workers == 1:
            encodes = with_controls(settings, engine.tokenizer, self.tokenizer)
            make_encoder = functools.partial(ChunkEncoder, settings, encodes)
        else:
            make_encoder = functools.partial(ChunkEncoder.load, settings, self.tokenizer.fingerprint, engine.kind)
        return ordered_map(
            make_encoder,
            itertools.chain(first, groups),
            settings.workers,
            fork=settings.fork,
            cache_bytes=MOST_CACHED_BYTES if engine.kind == "reference" else 0,
        )

    def _check_filled(self, outputs: list[Output], log: InvalidDocumentLog) -> None:
        """Refuse to write a dataset without documents."""
        if self.settings.allow_empty:
            return
        documents = sum(output.builder.documents for output in outputs)
        empty = [output for output in outputs if output.builder.documents == 0]
        if empty:
            self.journal.sources.clear()  # the same call cannot do better, so that nothing is worth keeping
        if documents == 0:
            raise no_document(self.settings.sources, log.counts)
        for output in empty:
            raise UserError(
                output.prefix,
                f"this part of the split got none of the {documents:,} documents",
                "give it a larger weight, more documents (--txt-documents), or leave it out",
            )

    def _shuffle(self) -> None:
        """Write the documents of each output in their new order, and complete the files."""
        states, log, seed = self.journal.outputs, self.journal.log, self.settings.shuffle_seed
        encoded_before = self.engine is None
        assert seed is not None, "only a run with a seed comes to this stage"
        with contextlib.ExitStack() as stack:
            for prefix, state in zip(self.settings.prefixes, states, strict=True):
                if state.builder.tokens == 0:
                    continue
                put_in_place(unshuffled(prefix))
                if encoded_before:
                    _check_unshuffled(unshuffled(prefix), state.builder)
                output = Output.from_state(prefix, IndexedDatasetBuilder(prefix, self.dtype), state, self.classes)
                stack.callback(output.close)
                shuffle_documents(IndexedDataset(unshuffled(prefix)), output.builder, seed)
                if output.labels is not None and state.labels is not None:
                    numbers = read_numbers(unshuffled(prefix), state.labels.documents, state.labels.completed or [])
                    output.labels.add(numbers[shuffled_order(numbers.size, seed)])
                    output.labels.complete()
                output.builder.complete(functools.partial(self._manifest, output, log))
            self.journal.checkpoint([], states, log, "placing", self._found_classes())

    def _move_outputs(self) -> None:
        """Give all complete files their final names, and note what the inputs were."""
        for prefix in self.settings.prefixes:
            with disk_errors(prefix):
                put_in_place(prefix)
                if self.settings.shuffle_seed is not None:
                    remove_dataset(unshuffled(prefix))
        write_input_note(self.settings.output_prefix, self.journal.sources)

    def _manifest(self, output: Output, log: InvalidDocumentLog, builder: IndexedDatasetBuilder) -> bytes:
        """Return the content of the manifest of ``output``, and keep the manifest for the report."""
        records = [*self.journal.sources, *self._unrecorded()]
        self.made[output.prefix] = made = make_manifest(self.settings, self.tokenizer, output, log, records)
        return made.to_json()

    def _manifest_of(self, prefix: Path) -> Manifest:
        """Return the manifest of a dataset, which an earlier run may have completed."""
        manifest = self.made.get(prefix) or read_manifest(prefix)
        assert manifest is not None, "a dataset of this run has a manifest"
        return manifest


def _check_unshuffled(prefix: Path, state: BuilderState) -> None:
    """Check that an earlier run's encoded documents are those that it wrote.

    Raises:
        UserError: they are not.
    """
    if state.unfinished_block is None:  # an earlier version began the run
        return
    dataset = IndexedDataset(prefix)
    recorded = [*state.blocks, *([state.unfinished_block] if dataset.tokens.nbytes % CHECKSUM_BLOCK else [])]
    pairs = {
        idx_path(prefix): (
            [zlib.crc32(as_bytes(dataset.lengths)), zlib.crc32(as_bytes(dataset.document_starts))],
            [state.lengths_checksum, state.starts_checksum],
        ),
        bin_path(prefix): (block_checksums(bin_path(prefix), threads=VERIFYING_THREADS), recorded),
    }
    for path, (found, expected) in pairs.items():
        if found != expected:
            problem = "was altered since an earlier run wrote it: it does not fit the journal"
            raise UserError(path, problem, "pass --restart to begin from the first file")


def total_size(sources: Iterable[Source]) -> int | None:
    """Return the bytes of all sources on disk; None if those of one are not known."""
    total = 0
    for source in sources:
        size = source.size
        if size is None:
            return None
        total += size
    return total


def _first_texts(groups: list[ChunkGroup], read: ReadOptions) -> Iterator[str]:
    """Yield the texts of the input's first documents, as many as are compared between engines."""
    room = CHECKED_BYTES
    chunks = itertools.chain.from_iterable(group.chunks for group in groups)
    for item in itertools.chain.from_iterable(parse_chunk(chunk, read) for chunk in chunks):
        if isinstance(item, Document) and len(item.utf8) <= room:
            room -= len(item.utf8)
            yield item.text


def _exists(prefix: Path) -> bool:
    """Return whether all files of dataset ``prefix`` exist."""
    return all(path.exists() for path in dataset_files(prefix))
