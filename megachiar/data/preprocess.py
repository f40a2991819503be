"""Text -> tokens on disk: the engine behind ``tools/preprocess_data.py``.

    sources -> chunks -> [parse, tokenize, split]  -> builders -> (shuffle) -> PREFIX.bin, .idx, .json
               parent      workers, in any order      parent, in the order of the input

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import megachiar
from megachiar.data.encoder import ChunkEncoder, EncodedPart, encode_without_threads
from megachiar.data.fast_tokenizer import CHECKED_BYTES, ChosenEngine, choose_engine
from megachiar.data.files import dataset_files, put_in_place, remove_dataset
from megachiar.data.indexed import IndexedDataset, IndexedDatasetBuilder, dtype_for_vocabulary
from megachiar.data.journal import Journal, OutputState
from megachiar.data.manifest import Checksums, Manifest, read_manifest
from megachiar.data.memory import give_back_free_memory
from megachiar.data.ordered_pool import ordered_map
from megachiar.data.piece_tokenizer import MOST_KNOWN_BYTES
from megachiar.data.progress import MEGA, TextProgress
from megachiar.data.readers import Chunk, Document, Source, TroubleLog, parse_chunk, read_chunks
from megachiar.data.recorded_tokenizer import describe_tokenizer
from megachiar.data.settings import PreprocessSettings
from megachiar.data.shuffle import shuffle_documents, unshuffled
from megachiar.data.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError, disk_errors

CHUNKS_BETWEEN_TIDYING = 64  # of this process's memory


@dataclass
class Output:
    """A dataset on its way to the disk, and what is known of its text.

    Attributes:
        prefix: where it will be; until its documents are shuffled they lie elsewhere.
    """

    prefix: Path
    builder: IndexedDatasetBuilder
    text_bytes: int = 0
    words: int = 0

    def add(self, part: EncodedPart) -> None:
        if part.lengths.size:
            self.builder.add_documents(part.tokens, part.lengths)
        self.text_bytes += part.text_bytes
        self.words += part.words

    def state(self) -> OutputState:
        return OutputState(self.builder.state(), self.text_bytes, self.words)


@dataclass
class Report:
    """What a run did.

    Attributes:
        manifests: prefix -> manifest of each dataset written.
        log: the documents left out.
        seconds: from the first byte read to the last one on the disk.
        engine: what encoded, and why; empty if an earlier run had encoded all.
        rate: megabytes of text a second; this run's own, without what an earlier one had done.
    """

    manifests: dict[Path, Manifest] = field(default_factory=dict)
    log: TroubleLog = field(default_factory=TroubleLog)
    seconds: float = 0.0
    engine: str = ""
    rate: float = 0.0

    def lines(self) -> Iterator[str]:
        """The report as text, line by line."""
        for trouble in self.log.examples:
            yield f"skipped {trouble.where}: {trouble.problem} [{trouble.kind}]"
        for prefix, made in self.manifests.items():
            ratio = made.tokens / max(1, made.text_bytes)
            yield (
                f"{prefix}.bin/.idx: {made.documents:,} documents, {made.tokens:,} tokens ({made.dtype}), "
                f"{made.text_bytes:,} bytes, {made.words:,} words, {ratio:.4f} tokens/byte"
            )
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.log.counts.items())) or "none"
        yield f"skipped documents: {left_out}; {self.seconds:.1f} s, {self.rate:.2f} MB/s"
        if self.engine:
            yield f"engine: {self.engine}"


def preprocess(settings: PreprocessSettings, stream: TextIO | None = None) -> Report:
    """Tokenize a corpus into datasets, going on where an earlier run of the same call was stopped.

    Args:
        settings: what to do.
        stream: where progress is shown, standard error if None.

    Raises:
        UserError: an output exists, the input or tokenizer cannot be used, a worker died, or the disk is full. No
            dataset is left then, but the inputs that were done are kept for the next run.
    """
    encode_without_threads()
    tokenizer = load_tokenizer(settings.tokenizer, settings.tokenizer_kind, settings.eod_token)
    if settings.append_eod and tokenizer.eod_id is None:
        raise UserError(
            settings.tokenizer,
            "has no end-of-document token, but --append-eod asks for one",
            "name it with --eod-token",
        )
    if not journal_path(settings).exists():
        check_outputs(settings)  # before anything is written
    with open_journal(settings, tokenizer) as journal:
        if journal.stage != "placing":
            check_outputs(settings)
        return _Run(settings, tokenizer, journal, stream or sys.stderr).go()


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
            journal.remove()
        raise
    journal.remove()


def check_outputs(settings: PreprocessSettings) -> None:
    """Refuse outputs that exist, unless they may be replaced, and those that are read (text, tokenizer) in any case.

    Raises:
        UserError: names the file.
    """
    read = [source.path for source in settings.sources if source.path is not None]
    read += [settings.tokenizer, *settings.tokenizer.glob("*")]  # tok.json would be the manifest of the prefix tok
    inputs = {path.resolve() for path in read}
    for path in itertools.chain.from_iterable(map(dataset_files, settings.prefixes)):
        if path.resolve() in inputs:
            raise UserError(path, "is an input and would be an output too", "choose another --output-prefix")
        if path.exists() and not settings.overwrite:
            raise UserError(path, "exists already", "choose another --output-prefix, or pass --overwrite")


class _Run:
    """One run, from wherever the journal says it is."""

    def __init__(self, settings: PreprocessSettings, tokenizer: Tokenizer, journal: Journal, stream: TextIO):
        self.settings, self.tokenizer, self.journal, self.stream = settings, tokenizer, journal, stream
        self.dtype = dtype_for_vocabulary(tokenizer.vocab_size)
        self.engine: ChosenEngine | None = None
        self.made: dict[Path, Manifest] = {}

    def go(self) -> Report:
        with TextProgress("preprocessing", _total_size(self.settings.sources), self.stream) as progress:
            if self.journal.stage == "encoding":
                self._encode(progress)
            if self.journal.stage == "shuffling":
                self._shuffle()
            self._place()
            return Report(
                manifests={prefix: self._manifest_of(prefix) for prefix in self.settings.prefixes if _is_there(prefix)},
                log=self.journal.log,
                seconds=progress.elapsed,
                engine=f"{self.engine.kind} ({self.engine.why})" if self.engine else "",
                rate=progress.per_second(progress.text_bytes) / MEGA,
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
                outputs.append(Output(prefix, builder, *((state.text_bytes, state.words) if state else (0, 0))))
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

    def _encode_sources(self, outputs: list[Output], done: int, progress: TextProgress) -> TroubleLog:
        settings, log = self.settings, self.journal.log
        log.on_error = settings.on_error
        waiting: collections.deque[int] = collections.deque()  # the source of each chunk under way
        identities: dict[int, list[Any]] = {}  # as they were before they were read

        def chunks() -> Iterator[Chunk]:
            for number, source in enumerate(settings.sources[done:], done):
                identities[number] = source.identity()
                for chunk in read_chunks([source], settings.read):
                    waiting.append(number)
                    yield chunk

        stream = chunks()
        first = list(itertools.islice(stream, 1))
        self.engine = choose_engine(settings.engine, self.tokenizer, _first_texts(first, settings.read.text_key))
        if settings.fork or settings.workers == 1:
            make_encoder = functools.partial(ChunkEncoder, settings, self.engine.tokenizer)
        else:
            make_encoder = functools.partial(ChunkEncoder.load, settings, self.tokenizer.fingerprint, self.engine.kind)
        remembers = MOST_KNOWN_BYTES if self.engine.kind == "reference" else 0
        results = ordered_map(
            *(make_encoder, itertools.chain(first, stream), settings.workers), fork=settings.fork, remembers=remembers
        )
        resumable = all(source.can_be_read_again for source in settings.sources)
        with contextlib.closing(results):
            for chunks_done, result in enumerate(results, 1):
                number = waiting.popleft()
                if chunks_done % CHUNKS_BETWEEN_TIDYING == 0:
                    give_back_free_memory()
                if resumable and number > len(self.journal.sources) and self.journal.due():
                    finished = range(len(self.journal.sources), number)
                    states = [output.state() for output in outputs]
                    self.journal.checkpoint([identities.pop(n) for n in finished], states, log)
                for output, part in zip(outputs, result.parts, strict=True):
                    output.add(part)
                log.merge(result.log)
                text_bytes = sum(part.text_bytes for part in result.parts)
                progress.advance(result.consumed, text_bytes, sum(part.lengths.size for part in result.parts))
        return log

    def _check_filled(self, outputs: list[Output], log: TroubleLog) -> None:
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
                output = Output(prefix, IndexedDatasetBuilder(prefix, self.dtype), state.text_bytes, state.words)
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

    def _manifest(self, output: Output, log: TroubleLog, builder: IndexedDatasetBuilder) -> bytes:
        self.made[output.prefix] = made = make_manifest(self.settings, self.tokenizer, output, log)
        return made.to_json()

    def _manifest_of(self, prefix: Path) -> Manifest:
        """This run's, or that of the earlier run whose outputs were left to be placed."""
        manifest = self.made.get(prefix) or read_manifest(prefix)
        assert manifest is not None
        return manifest


def make_manifest(settings: PreprocessSettings, tokenizer: Tokenizer, output: Output, log: TroubleLog) -> Manifest:
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


def _first_texts(chunks: list[Chunk], text_key: str) -> Iterator[str]:
    """Texts of the input's first documents, as many as are compared between engines."""
    room = CHECKED_BYTES
    for item in itertools.chain.from_iterable(parse_chunk(chunk, text_key) for chunk in chunks):
        if isinstance(item, Document) and len(item.utf8) <= room:
            room -= len(item.utf8)
            yield item.text


def _is_there(prefix: Path) -> bool:
    return all(path.exists() for path in dataset_files(prefix))
