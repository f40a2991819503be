"""Text -> tokens on disk: the engine behind ``megachiar preprocess``.

    sources -> groups of chunks -> [parse, tokenize, split] -> builders -> (shuffle) -> PREFIX.bin, .idx, .json
               parent              workers, in any order      parent, in the order of the input

Output bytes depend on the input, the tokenizer and the options alone, never on the number of workers nor on how often
the run was killed and started again: ``PREFIX.journal`` tells which inputs are done. All outputs of a run appear at its
end or not at all.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import megachiar
from megachiar.data.inputs.chunk_groups import ChunkGroup, read_groups
from megachiar.data.inputs.documents import Document, InvalidDocumentLog, parse_chunk
from megachiar.data.inputs.find_inputs import same_file
from megachiar.data.inputs.source import Source
from megachiar.data.preprocessing.encoder import ChunkEncoder, EncodedPart, encode_without_threads
from megachiar.data.preprocessing.existing import Differs, find_existing
from megachiar.data.preprocessing.journal import Journal, OutputState
from megachiar.data.preprocessing.ordered_pool import ordered_map
from megachiar.data.preprocessing.report import Report, describe_ending
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shuffle import shuffle_documents, unshuffled
from megachiar.data.storage.files import dataset_files, put_in_place, remove_dataset
from megachiar.data.storage.index_format import dtype_for_vocabulary
from megachiar.data.storage.manifest import Checksums, Manifest, read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.data.tokenizers.fast import CHECKED_BYTES, EngineChoice, choose_engine
from megachiar.data.tokenizers.pieces import MOST_CACHED_BYTES
from megachiar.data.tokenizers.recorded import describe_tokenizer
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError, disk_errors
from megachiar.process_memory import give_back_free_memory
from megachiar.progress import MEGA, TextProgress

GROUPS_BETWEEN_TIDYING = 64  # of this process's memory


@dataclass
class Output:
    """A dataset on its way to the disk, and what is known of its text.

    Attributes:
        prefix: where it will be; until its documents are shuffled they lie elsewhere.
        unknown_tokens: None where the version that began this run did not count them.
    """

    prefix: Path
    builder: IndexedDatasetBuilder
    text_bytes: int = 0
    words: int = 0
    unknown_tokens: int | None = 0

    def add(self, part: EncodedPart) -> None:
        if part.lengths.size:
            self.builder.add_documents(part.tokens, part.lengths)
        self.text_bytes += part.text_bytes
        self.words += part.words
        if self.unknown_tokens is not None:
            self.unknown_tokens += part.unknown_tokens

    def state(self) -> OutputState:
        return OutputState(self.builder.state(), self.text_bytes, self.words, self.unknown_tokens)


def preprocess(settings: PreprocessSettings, stream: TextIO | None = None) -> Report:
    """Tokenize a corpus into datasets, going on where an earlier run of the same call was stopped.

    Where an earlier run of the same call was finished, and no input was changed since, nothing is done.

    Args:
        settings: what to do.
        stream: where progress is shown, standard error if None.

    Raises:
        UserError: an output exists and is not what this call makes, the input or tokenizer cannot be used, a worker
            died, or the disk is full. No new dataset is left then; the inputs that were done are kept for the next
            run.
    """
    with disk_errors(settings.output_prefix, "read or write"):
        return _preprocess(settings, stream or sys.stderr)


def _preprocess(settings: PreprocessSettings, stream: TextIO) -> Report:
    encode_without_threads()
    for line in itertools.chain.from_iterable(found.lines() for found in settings.found):
        print(line, file=stream)
    tokenizer = load_tokenizer(settings.tokenizer, settings.tokenizer_kind, settings.eod_token)
    if settings.append_eod and tokenizer.eod_id is None:
        raise UserError(
            settings.tokenizer,
            "has no end-of-document token, but --append-eod asks for one",
            "name it with --eod-token",
        )
    if not journal_path(settings).exists():
        if (existing := existing_report(settings, tokenizer)) is not None:
            return existing
        check_outputs(settings, tokenizer)  # before anything is written
    with open_journal(settings, tokenizer) as journal:
        if journal.stage != "placing":
            check_outputs(settings, tokenizer)
        return _Run(settings, tokenizer, journal, stream).go()


def journal_path(settings: PreprocessSettings) -> Path:
    """Where a run keeps what it has done."""
    return Path(f"{settings.output_prefix}.journal")


@contextlib.contextmanager
def open_journal(settings: PreprocessSettings, tokenizer: Tokenizer) -> Iterator[Journal]:
    """The run's journal; kept if the block fails after something was done, removed otherwise."""
    options = {
        "tokenizer": tokenizer.fingerprint,
        "end_of_document": tokenizer.eod_id if settings.append_eod else None,
        "shuffle_seed": settings.shuffle_seed,
        **settings.deciding,
    }
    journal = Journal.open(journal_path(settings), options, restart=settings.restart)
    try:
        journal.check_sources(settings.sources)
        yield journal
    except BaseException:
        if journal.sources or journal.stage != "encoding":
            journal.close()
        else:
            with contextlib.suppress(UserError):  # what ended the run is what is told
                journal.remove()
        raise
    journal.remove()


def existing_report(settings: PreprocessSettings, tokenizer: Tokenizer) -> Report | None:
    """Report on the datasets of this call if an earlier one made them; None if there is something to do."""
    if settings.overwrite:
        return None
    try:
        return Report.of_existing(find_existing(settings, tokenizer))
    except Differs:
        return None


def check_outputs(settings: PreprocessSettings, tokenizer: Tokenizer) -> None:
    """Refuse outputs that exist, unless they may be replaced, and those that are read (text, tokenizer) in any case.

    Raises:
        UserError: names the file, and why it is not what this call would make.
    """
    own = [settings.tokenizer, *settings.tokenizer.glob("*")]  # tok.json would be the manifest of the prefix tok
    for path in itertools.chain.from_iterable(map(dataset_files, settings.prefixes)):
        if path.resolve() in {file.resolve() for file in own} or same_file(path, settings.sources):
            raise UserError(path, "is an input and would be an output too", "choose another --output-prefix")
        if path.exists() and not settings.overwrite:
            problem = describe_existing(settings, tokenizer)
            raise UserError(path, problem, "choose another --output-prefix, or pass --overwrite")


def describe_existing(settings: PreprocessSettings, tokenizer: Tokenizer) -> str:
    """Say that an output exists, and why it is not what this call would make."""
    try:
        find_existing(settings, tokenizer)
    except Differs as difference:
        return f"exists already, and not as this command makes it: {difference}"
    return "exists already"


class _Run:
    """One run, from wherever the journal says it is."""

    def __init__(self, settings: PreprocessSettings, tokenizer: Tokenizer, journal: Journal, stream: TextIO):
        self.settings, self.tokenizer, self.journal, self.stream = settings, tokenizer, journal, stream
        self.dtype = dtype_for_vocabulary(tokenizer.vocab_size)
        self.engine: EngineChoice | None = None
        self.made: dict[Path, Manifest] = {}

    def go(self) -> Report:
        with TextProgress("preprocessing", _total_size(self.settings.sources), self.stream) as progress:
            if self.journal.stage == "encoding":
                self._encode(progress)
            if self.journal.stage == "shuffling":
                self._shuffle()
            self._place()
            unknown = [state.unknown_tokens for state in self.journal.outputs]
            return Report(
                manifests={prefix: self._manifest_of(prefix) for prefix in self.settings.prefixes if _is_there(prefix)},
                log=self.journal.log,
                seconds=progress.elapsed,
                engine=f"{self.engine.kind} ({self.engine.reason})" if self.engine else "",
                rate=progress.per_second(progress.text_bytes) / MEGA,
                found=self.settings.found,
                ending=describe_ending(self.tokenizer, self.settings.append_eod),
                unknown_id=self.tokenizer.unknown_id,
                unknown_tokens=dict(zip(self.settings.prefixes, unknown, strict=True)),
            )

    def _encode(self, progress: TextProgress) -> None:
        """Encode the inputs that are missing and complete the outputs."""
        done, shuffling = len(self.journal.sources), self.settings.shuffle_seed is not None
        if done:
            progress.advance(_total_size(self.settings.sources[:done]) or 0)
            print(f"going on after {done:,} of {len(self.settings.sources):,} inputs, done before", file=self.stream)
        with self._outputs() as outputs:
            log = self._encode_sources(outputs, done, progress)
            self._check_filled(outputs, log)
            states = [output.state() for output in outputs]
            for output in outputs:
                if output.builder.tokens:
                    output.builder.complete(None if shuffling else functools.partial(self._manifest, output, log))
            rest = [source.identity() for source in self.settings.sources[len(self.journal.sources) :]]
            self.journal.checkpoint(rest, states, log, "shuffling" if shuffling else "placing")

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[list[Output]]:
        """Builders of all parts. If the block fails, what is worth keeping for the next run is kept."""
        outputs: list[Output] = []
        known = self.journal.outputs or [None] * len(self.settings.prefixes)
        try:
            for prefix, state in zip(self.settings.prefixes, known, strict=True):
                first = prefix if self.settings.shuffle_seed is None else unshuffled(prefix)
                builder = IndexedDatasetBuilder(first, self.dtype, state.builder if state else None)
                known_text = (state.text_bytes, state.words, state.unknown_tokens) if state else ()
                outputs.append(Output(prefix, builder, *known_text))
            yield outputs
        except BaseException:
            for output in outputs:
                if self.journal.sources:
                    output.builder.close()
                else:
                    output.builder.abort()
            if self.journal.sources:
                total = len(self.settings.sources)
                kept = f"{len(self.journal.sources):,} of {total:,} inputs are done and kept"
                print(f"{kept}: run the same command again to go on", file=self.stream)
            raise
        for output in outputs:
            output.builder.close()
            if not output.builder.tokens:
                output.builder.abort()

    def _encode_sources(self, outputs: list[Output], done: int, progress: TextProgress) -> InvalidDocumentLog:
        settings, log = self.settings, self.journal.log
        log.on_error = settings.on_error
        waiting: collections.deque[ChunkGroup] = collections.deque()  # groups under way, without their text
        identities: dict[int, list[Any]] = {}  # as they were before they were read

        def sources() -> Iterator[tuple[int, Source]]:
            for number, source in enumerate(settings.sources[done:], done):
                identities[number] = source.identity()
                yield number, source

        def groups() -> Iterator[ChunkGroup]:
            for group in read_groups(sources(), settings.read):
                waiting.append(group._replace(chunks=[]))
                yield group

        stream = groups()
        first = list(itertools.islice(stream, 1))
        self.engine = choose_engine(settings.engine, self.tokenizer, _first_texts(first, settings.read.text_key))
        if settings.fork or settings.workers == 1:
            make_encoder = functools.partial(ChunkEncoder, settings, self.engine.tokenizer)
        else:
            make_encoder = functools.partial(ChunkEncoder.load, settings, self.tokenizer.fingerprint, self.engine.kind)
        remembers = MOST_CACHED_BYTES if self.engine.kind == "reference" else 0
        results = ordered_map(
            *(make_encoder, itertools.chain(first, stream), settings.workers), fork=settings.fork, remembers=remembers
        )
        resumable = all(source.can_be_read_again for source in settings.sources)
        with contextlib.closing(results):
            for groups_done, result in enumerate(results, 1):
                group = waiting.popleft()
                if groups_done % GROUPS_BETWEEN_TIDYING == 0:
                    give_back_free_memory()
                finished = range(len(self.journal.sources), group.first_source)
                # Only where a source begins: what of it was added before would be added again by the run that goes on.
                if resumable and group.begins_source and finished and self.journal.due():
                    states = [output.state() for output in outputs]
                    self.journal.checkpoint([identities.pop(n) for n in finished], states, log)
                for output, part in zip(outputs, result.parts, strict=True):
                    output.add(part)
                log.merge(result.log)
                text_bytes = sum(part.text_bytes for part in result.parts)
                progress.advance(result.consumed, text_bytes, sum(part.lengths.size for part in result.parts))
        return log

    def _check_filled(self, outputs: list[Output], log: InvalidDocumentLog) -> None:
        """Refuse to write a dataset without documents."""
        documents = sum(output.builder.documents for output in outputs)
        skipped = ", ".join(f"{count} {kind}" for kind, count in log.counts.items())
        if documents == 0 and not self.settings.allow_empty:
            self.journal.sources.clear()  # the same call cannot do better: nothing is worth keeping
            raise UserError(
                "--input", f"held no usable document (skipped: {skipped or 'none'})", "check the input and --text-key"
            )
        for output in outputs:
            if output.builder.documents == 0 and not self.settings.allow_empty:
                self.journal.sources.clear()
                raise UserError(
                    output.prefix,
                    f"this part of the split got none of the {documents:,} documents",
                    "give it a larger weight, more documents (--txt-documents), or leave it out",
                )

    def _shuffle(self) -> None:
        states, log = self.journal.outputs, self.journal.log
        with contextlib.ExitStack() as stack:
            for prefix, state in zip(self.settings.prefixes, states, strict=True):
                if state.builder.tokens == 0:
                    continue
                put_in_place(unshuffled(prefix))
                builder = IndexedDatasetBuilder(prefix, self.dtype)
                output = Output(prefix, builder, state.text_bytes, state.words, state.unknown_tokens)
                stack.callback(output.builder.close)
                shuffle_documents(IndexedDataset(unshuffled(prefix)), output.builder, self.settings.shuffle_seed)
                output.builder.complete(functools.partial(self._manifest, output, log))
            self.journal.checkpoint([], states, log, "placing")

    def _place(self) -> None:
        for prefix in self.settings.prefixes:
            with disk_errors(prefix):
                put_in_place(prefix)
                if self.settings.shuffle_seed is not None:
                    remove_dataset(unshuffled(prefix))

    def _manifest(self, output: Output, log: InvalidDocumentLog, builder: IndexedDatasetBuilder) -> bytes:
        self.made[output.prefix] = made = make_manifest(self.settings, self.tokenizer, output, log)
        return made.to_json()

    def _manifest_of(self, prefix: Path) -> Manifest:
        """This run's, or that of the earlier run whose outputs were left to be placed."""
        manifest = self.made.get(prefix) or read_manifest(prefix)
        assert manifest is not None
        return manifest


def make_manifest(
    settings: PreprocessSettings, tokenizer: Tokenizer, output: Output, log: InvalidDocumentLog
) -> Manifest:
    """The manifest of a complete output."""
    builder = output.builder
    return Manifest(
        tokenizer=describe_tokenizer(tokenizer, output.prefix.parent),
        dtype=builder.dtype.name,
        append_eod=settings.append_eod,
        documents=builder.documents,
        tokens=builder.tokens,
        text_bytes=output.text_bytes,
        words=output.words,
        skipped=dict(sorted(log.counts.items())),
        largest_token_id=builder.largest_token_id,
        checksums=Checksums(**builder.checksums),
        shuffle_seed=settings.shuffle_seed,
        sources=[source.name for source in settings.sources],
        options=settings.deciding,
        created_by=f"megachiar {megachiar.__version__} preprocess_data",
    )


def _total_size(sources: list[Source]) -> int | None:
    sizes = [source.size for source in sources]
    return None if None in sizes else sum(sizes)


def _first_texts(groups: list[ChunkGroup], text_key: str) -> Iterator[str]:
    """Texts of the input's first documents, as many as are compared between engines."""
    room = CHECKED_BYTES
    chunks = itertools.chain.from_iterable(group.chunks for group in groups)
    for item in itertools.chain.from_iterable(parse_chunk(chunk, text_key) for chunk in chunks):
        if isinstance(item, Document) and len(item.utf8) <= room:
            room -= len(item.utf8)
            yield item.text


def _is_there(prefix: Path) -> bool:
    return all(path.exists() for path in dataset_files(prefix))
