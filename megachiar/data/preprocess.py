"""Text -> tokens on disk: the engine behind ``tools/preprocess_data.py``.

    sources -> chunks -> [parse, tokenize, split]  -> builders -> PREFIX.bin, .idx, .json
               parent      workers, in any order      parent, in the order of the input

Output bytes depend on the input, the tokenizer and the options alone, never on the number of workers. All outputs of a
run appear at its end or not at all.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

import megachiar
from megachiar.data.files import dataset_files
from megachiar.data.indexed import IndexedDatasetBuilder, dtype_for_vocabulary
from megachiar.data.manifest import Manifest, TokenizerRecord, write_manifest
from megachiar.data.ordered_pool import ordered_map
from megachiar.data.progress import MEGA, TextProgress
from megachiar.data.readers import (
    Chunk,
    Document,
    OnError,
    ReadOptions,
    Source,
    Trouble,
    TroubleLog,
    parse_chunk,
    read_chunks,
)
from megachiar.data.tokenizer import Tokenizer, TokenizerKind, load_tokenizer
from megachiar.errors import UserError

HASH_BITS = 64


@dataclass(frozen=True)
class Split:
    """Parts of a corpus and which documents belong to each.

    A document goes where the hash of its text falls, so that it stays in its part however the corpus is ordered, cut
    into files or added to, and so that equal documents are never on both sides.

    Attributes:
        names: of the parts, in order.
        bounds: a document with hash h belongs to the first part with ``h < bound``; the last one is 2**64.
    """

    names: tuple[str, ...]
    bounds: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Split:
        """Read ``"train=98,valid=1,test=1"``: names and their weights, whatever these sum to.

        Raises:
            UserError: not of that form, a name twice, or a weight that is not above 0.
        """
        parts = [part.partition("=") for part in text.split(",")]
        names = tuple(name.strip() for name, _, _ in parts)
        try:
            weights = [Fraction(weight.strip()) for _, _, weight in parts]
        except (ValueError, ZeroDivisionError) as error:
            raise _bad_split(text, "a weight is not a number") from error
        if not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) for name in names):
            raise _bad_split(text, "a name may hold letters, digits, - and _")
        if len(set(names)) != len(names):
            raise _bad_split(text, "a name occurs twice")
        if min(weights) <= 0:
            raise _bad_split(text, "weights must be above 0")
        ends = itertools.accumulate(weights)
        return cls(names, tuple(int(end / sum(weights) * 2**HASH_BITS) for end in ends))

    def part_of(self, utf8: bytes) -> int:
        """Index of the part that the document with this text belongs to."""
        digest = hashlib.blake2b(utf8, digest_size=HASH_BITS // 8).digest()
        return bisect.bisect_right(self.bounds, int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class PreprocessSettings:
    """What a run of preprocessing is to do.

    Attributes:
        sources: the corpus, in order.
        tokenizer, tokenizer_kind, eod_token: as ``load_tokenizer`` takes them.
        output_prefix: the dataset's path without suffix; with ``split``, parts are ``PREFIX_name``.
        read: how documents are found.
        append_eod: end each document with the tokenizer's end-of-document id.
        split: parts by document hash, None for one dataset.
        on_error: what an unusable document does, see ``TroubleLog``.
        workers: tokenizing processes; 1 works in this one.
        overwrite: replace datasets that exist, at the end of the run.
    """

    sources: list[Source]
    tokenizer: Path
    output_prefix: Path
    tokenizer_kind: TokenizerKind = "auto"
    eod_token: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    append_eod: bool = False
    split: Split | None = None
    on_error: OnError = "refuse"
    workers: int = 1
    overwrite: bool = False

    @property
    def prefixes(self) -> list[Path]:
        """One per part of the split."""
        names = self.split.names if self.split else ()
        return [Path(f"{self.output_prefix}_{name}") for name in names] or [self.output_prefix]


class EncodedPart(NamedTuple):
    """Documents of one chunk that belong to one part of the split.

    Attributes:
        tokens: of all documents, one after another, shape (sum(lengths),), in the dataset's type.
        lengths: tokens of each document, shape (documents,), int64.
        text_bytes, words: of their text: UTF-8 bytes, and what stands between whitespace.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    words: int


class EncodedChunk(NamedTuple):
    """What became of a chunk: one ``EncodedPart`` per part of the split, its troubles, and the input read for it."""

    parts: list[EncodedPart]
    log: TroubleLog
    consumed: int


class ChunkEncoder:
    """Chunk -> ``EncodedChunk``: all the work that is done in worker processes."""

    def __init__(self, settings: PreprocessSettings, fingerprint: str):
        """``fingerprint``: of the tokenizer that the run began with.

        Raises:
            UserError: the tokenizer's files changed since.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch; parallel are the processes
        self._settings = settings
        self._tokenizer = _load(settings)
        self._dtype = dtype_for_vocabulary(self._tokenizer.vocab_size)
        if self._tokenizer.fingerprint != fingerprint:
            raise UserError(settings.tokenizer, "was changed during the run", "start again and leave it alone")

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        log = TroubleLog(self._settings.on_error)
        documents = []
        for item in parse_chunk(chunk, self._settings.read.text_key):
            if isinstance(item, Trouble):
                log.add(item)
            else:
                documents.append(item)
        encoded = self._tokenizer.encode_batch([document.text for document in documents])
        members: list[list[tuple[Document, list[int]]]] = [[] for _ in self._settings.prefixes]
        for document, ids in zip(documents, encoded, strict=True):
            if not ids:
                place = f"{chunk.source}, from line or document {chunk.first} on"
                log.add(Trouble("empty", place, f"the tokenizer makes no token of {document.text[:40]!r}"))
                continue
            if self._settings.append_eod:
                ids.append(self._tokenizer.eod_id)
            members[self._part_of(document)].append((document, ids))
        return EncodedChunk([self._encoded_part(part) for part in members], log, chunk.consumed)

    def _part_of(self, document: Document) -> int:
        return self._settings.split.part_of(document.utf8) if self._settings.split else 0

    def _encoded_part(self, members: list[tuple[Document, list[int]]]) -> EncodedPart:
        lengths = np.array([len(ids) for _, ids in members], dtype=np.int64)
        flat = itertools.chain.from_iterable(ids for _, ids in members)
        tokens = np.fromiter(flat, dtype=np.int64, count=int(lengths.sum()))
        return EncodedPart(
            tokens=narrow(tokens, self._dtype, self._settings.tokenizer),
            lengths=lengths,
            text_bytes=sum(len(document.utf8) for document, _ in members),
            words=sum(len(document.text.split()) for document, _ in members),
        )


def narrow(tokens: np.ndarray, dtype: np.dtype, tokenizer: Path) -> np.ndarray:
    """``tokens`` (int64, any shape) in ``dtype``.

    Raises:
        UserError: an id does not fit; stored anyway it would be another token.
    """
    limits = np.iinfo(dtype)
    if tokens.size and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
        worst = tokens.max() if tokens.max() > limits.max else tokens.min()
        raise UserError(
            tokenizer,
            f"gave token id {worst}, but its vocabulary is stored as {dtype.name} ({limits.min} to {limits.max})",
            "the tokenizer's own vocabulary size is wrong: export it again",
        )
    return tokens.astype(dtype)


@dataclass
class Output:
    """A dataset on its way to the disk, and what is known of its text."""

    builder: IndexedDatasetBuilder
    text_bytes: int = 0
    words: int = 0

    def add(self, part: EncodedPart) -> None:
        if part.lengths.size:
            self.builder.add_documents(part.tokens, part.lengths)
        self.text_bytes += part.text_bytes
        self.words += part.words


@dataclass
class Report:
    """What a run did.

    Attributes:
        manifests: prefix -> manifest of each dataset written.
        log: the documents left out.
        seconds: from the first byte read to the last one on the disk.
    """

    manifests: dict[Path, Manifest] = field(default_factory=dict)
    log: TroubleLog = field(default_factory=TroubleLog)
    seconds: float = 0.0

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
        text_bytes = sum(made.text_bytes for made in self.manifests.values())
        rate = text_bytes / MEGA / max(self.seconds, 1e-9)
        yield f"skipped documents: {left_out}; {self.seconds:.1f} s, {rate:.2f} MB/s"


def preprocess(settings: PreprocessSettings, stream: TextIO | None = None) -> Report:
    """Tokenize a corpus into datasets.

    Args:
        settings: what to do.
        stream: where progress is shown, standard error if None.

    Raises:
        UserError: an output exists, the input or tokenizer cannot be used, a worker died, or the disk is full; nothing
            of this run is left then.
    """
    tokenizer = _load(settings)
    if settings.append_eod and tokenizer.eod_id is None:
        raise UserError(
            settings.tokenizer,
            "has no end-of-document token, but --append-eod asks for one",
            "name it with --eod-token",
        )
    check_outputs(settings)
    with (
        TextProgress("preprocessing", _total_size(settings.sources), stream) as progress,
        _outputs(settings, dtype_for_vocabulary(tokenizer.vocab_size)) as outputs,
    ):
        log = _encode_all(settings, tokenizer, outputs, progress)
        _check_filled(outputs, log)
        manifests = _complete(settings, tokenizer, outputs, log)
        return Report(manifests, log, progress.elapsed)


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


def _load(settings: PreprocessSettings) -> Tokenizer:
    return load_tokenizer(settings.tokenizer, settings.tokenizer_kind, settings.eod_token)


def _total_size(sources: list[Source]) -> int | None:
    sizes = [source.size for source in sources]
    return None if None in sizes else sum(sizes)


@contextlib.contextmanager
def _outputs(settings: PreprocessSettings, dtype: np.dtype) -> Iterator[list[Output]]:
    """Builders of all parts; if the block fails at any point, nothing of them is left."""
    outputs: list[Output] = []
    try:
        for prefix in settings.prefixes:
            outputs.append(Output(IndexedDatasetBuilder(prefix, dtype)))
        yield outputs
    except BaseException:
        for output in outputs:
            output.builder.abort()
            if output.builder.checksums:  # was completed before a later part failed
                for path in dataset_files(output.builder.prefix):
                    path.unlink(missing_ok=True)
        raise


def _encode_all(
    settings: PreprocessSettings, tokenizer: Tokenizer, outputs: list[Output], progress: TextProgress
) -> TroubleLog:
    log = TroubleLog(settings.on_error)
    make_encoder = functools.partial(ChunkEncoder, settings, tokenizer.fingerprint)
    results = ordered_map(make_encoder, read_chunks(settings.sources, settings.read), settings.workers)
    with contextlib.closing(results):
        for chunk in results:
            for output, part in zip(outputs, chunk.parts, strict=True):
                output.add(part)
            log.merge(chunk.log)
            text_bytes = sum(part.text_bytes for part in chunk.parts)
            progress.advance(chunk.consumed, text_bytes, sum(part.lengths.size for part in chunk.parts))
    return log


def _check_filled(outputs: list[Output], log: TroubleLog) -> None:
    """Refuse to write a dataset without documents."""
    documents = sum(output.builder.documents for output in outputs)
    skipped = ", ".join(f"{count} {kind}" for kind, count in log.counts.items())
    for output in outputs:
        if documents == 0:
            raise UserError(
                "--input", f"held no usable document (skipped: {skipped or 'none'})", "check the input and --text-key"
            )
        if output.builder.documents == 0:
            raise UserError(
                output.builder.prefix,
                f"this part of the split got none of the {documents:,} documents",
                "give it a larger weight, more documents (--txt-documents), or leave it out",
            )


def _complete(
    settings: PreprocessSettings, tokenizer: Tokenizer, outputs: list[Output], log: TroubleLog
) -> dict[Path, Manifest]:
    """Put all datasets in their places, then the manifests beside them."""
    for output in outputs:
        output.builder.finish()
    manifests = {}
    for output in outputs:
        prefix = output.builder.prefix
        manifests[prefix] = _manifest(settings, tokenizer, output, log)
        write_manifest(prefix, manifests[prefix])
    return manifests


def _manifest(settings: PreprocessSettings, tokenizer: Tokenizer, output: Output, log: TroubleLog) -> Manifest:
    builder = output.builder
    file, folder = tokenizer.path.resolve(), builder.prefix.parent.resolve()
    record = TokenizerRecord(
        kind=tokenizer.kind,
        file=str(
            file.relative_to(folder) if file.is_relative_to(folder) else file
        ),  # relative where both move together
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
    )
    return Manifest(
        tokenizer=record,
        dtype=builder.dtype.name,
        append_eod=settings.append_eod,
        documents=builder.documents,
        tokens=builder.tokens,
        text_bytes=output.text_bytes,
        words=output.words,
        skipped=dict(sorted(log.counts.items())),
        largest_token_id=builder.largest_token_id,
        checksums=builder.checksums,
        sources=[source.name for source in settings.sources],
        created_by=f"megachiar {megachiar.__version__} preprocess_data",
    )


def _bad_split(text: str, problem: str) -> UserError:
    return UserError(f"--split {text}", problem, "write it like train=98,valid=1,test=1")
