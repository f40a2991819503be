"""Train a tokenizer on a corpus: the engine behind ``megachiar tokenizer``.

All kinds but words encode any text, and decoding gives it back character for character:

* SentencePiece: no normalization, no dummy prefix, no whitespace removed. ``\\n`` is a piece of its own, and digits are
  split. A character that is not in the vocabulary becomes its UTF-8 bytes. One character is an exception of the
  library: U+2581 (``▁``), its mark for a space, is decoded as a space.
* Hugging Face: byte-level BPE with GPT-2's splitting and all 256 bytes in the vocabulary.
* Bytes: one token for each byte, which needs no corpus. Words keep the words alone, not the spaces between them, and
  stand apart: see ``plain_tokenizers``.

The same input and options give the same file, byte for byte. A note ``NAME.made`` beside it records them, so that the
same command does nothing when it is given again.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import itertools
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from megachiar.data.inputs.documents import InvalidDocumentLog, OnError, ReadOptions
from megachiar.data.inputs.find_inputs import same_file
from megachiar.data.inputs.folder_files import FoundFiles
from megachiar.data.inputs.readers import read_documents
from megachiar.data.inputs.source import Source, no_document
from megachiar.data.inputs.source_reading import SourceRecorder
from megachiar.data.preprocessing.choices import SUFFIXES, Algorithm, TrainedKind
from megachiar.data.preprocessing.existing import OutputDiffers, compare_records, note_path, read_note, write_note
from megachiar.data.preprocessing.plain_tokenizers import BYTE_VOCABULARY, BYTES, byte_tokenizer, word_tokenizer
from megachiar.data.storage.files import write_atomically
from megachiar.data.tokenizers.gpt2_files import GPT2_EOD
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError, disk_errors
from megachiar.interrupts import interrupts_go_to
from megachiar.progress import TextProgress

FEWEST_WORDS = 3  # two special tokens and a word
# SentencePiece skips sentences above 4,192 bytes without a word, and its results change with its threads.
LONGEST_SENTENCE = 1000  # characters, of up to 4 bytes each
SENTENCEPIECE_THREADS = 16
NOTED_COUNTS = ("used_documents", "used_bytes", "read_documents", "read_bytes")  # of a report, kept in the note
PIECES_OF_LINE = re.compile(rf".{{1,{LONGEST_SENTENCE}}}(?=\s|$)|.{{1,{LONGEST_SENTENCE}}}")


@dataclass(frozen=True)
class TrainingSettings:
    """Describe the tokenizer to train, and its corpus.

    Attributes:
        sources: the inputs of the corpus.
        output: the file to write, ``.model`` or ``.json`` by ``kind``.
        vocab_size: the exact number of tokens in the vocabulary, special ones and the 256 bytes included; of words the
            most. None takes all words; bytes have a size of their own.
        kind: the library of the tokenizer, or ``bytes`` or ``words``, which Hugging Face's library encodes.
        algorithm: SentencePiece has both algorithms, Hugging Face only BPE.
        read: how documents are found.
        max_text_bytes: the most text to train on; if the corpus has more, documents are drawn evenly from all of it.
        on_error: whether an invalid document ends the run, see ``InvalidDocumentLog``.
        overwrite: replace ``output`` if it exists.
        found: what folders and globs among the inputs gave, for the report.
    """

    sources: list[Source]
    output: Path
    vocab_size: int | None
    kind: TrainedKind = "sentencepiece"
    algorithm: Algorithm = "bpe"
    read: ReadOptions = field(default_factory=ReadOptions)
    max_text_bytes: int = 200 << 20
    on_error: OnError = "refuse"
    overwrite: bool = False
    found: list[FoundFiles] = field(default_factory=list)

    @property
    def loaded_by(self) -> str:
        """Return the kind of the tokenizer as ``load_tokenizer`` names it."""
        return "sentencepiece" if self.kind == "sentencepiece" else "huggingface"

    @property
    def determining_options(self) -> dict[str, Any]:
        """Return the options that, beside the inputs, determine the file that is written."""
        return {
            "vocab_size": self.vocab_size,
            "kind": self.kind,
            "algorithm": self.algorithm,
            "text_key": self.read.text_key,
            **({"more_text_keys": list(self.read.more_text_keys)} if self.read.more_text_keys else {}),
            "txt_documents": self.read.txt_documents,
            "max_text_bytes": self.max_text_bytes,
            "on_error": self.on_error,
        }


class TrainingReport(NamedTuple):
    """Hold the tokenizer as written, and the counts of its training text.

    Attributes:
        tokenizer: the tokenizer, loaded from the file that was written.
        used_documents, used_bytes: the documents and UTF-8 bytes of text that it was trained on.
        read_documents, read_bytes: the documents and UTF-8 bytes of text that were read.
        log: the documents left out.
        existed: whether the tokenizer existed already, made by the same call, so that nothing was done.
    """

    tokenizer: Tokenizer
    used_documents: int
    used_bytes: int
    read_documents: int
    read_bytes: int
    log: InvalidDocumentLog
    existed: bool = False


def train_tokenizer(settings: TrainingSettings, stream: TextIO | None = None) -> TrainingReport:
    """Train a tokenizer and write it, whole or not at all; do nothing if the same call has done it before.

    Args:
        settings: of the tokenizer.
        stream: where progress is shown; standard error if None.

    Raises:
        UserError: the output has the wrong suffix, or exists and was not made by the same call. The corpus cannot be
            read, corpus and size of the vocabulary do not fit each other, or the disk is full.
    """
    with disk_errors(settings.output):
        _check(settings)
        exists = settings.output.exists()
    if exists and not settings.overwrite:
        return _existing(settings, stream)
    for line in itertools.chain.from_iterable(found.lines() for found in settings.found):
        print(line, file=stream or sys.stderr)
    log = InvalidDocumentLog(settings.on_error)
    recorder = SourceRecorder()
    with TextProgress("reading", None, stream) as progress:
        sample = sample_texts(_counted(settings, log, progress, recorder), settings.max_text_bytes)
    if not sample and settings.kind != "bytes":
        raise no_document(settings.sources, log.counts)
    if sample:
        print(f"training on {len(sample):,} of {progress.documents:,} documents", file=stream or sys.stderr)
    train = _TRAINERS[settings.kind]
    # Ctrl-C ends the process at once: the trainers run for minutes without looking, and nothing is written yet.
    with interrupts_go_to(signal.SIG_DFL):
        content = train(settings, sample)
    write_atomically(settings.output, content)
    report = TrainingReport(
        tokenizer=load_tokenizer(settings.output, settings.loaded_by),
        used_documents=len(sample),
        used_bytes=sum(len(text.encode()) for text in sample),
        read_documents=progress.documents,
        read_bytes=progress.text_bytes,
        log=log,
    )
    counts = {key: value for key, value in report._asdict().items() if key in NOTED_COUNTS}
    noted = {**counts, "skipped": dict(log.counts)}
    requested = {**settings.determining_options, "inputs": recorder.records()}
    write_note(note_path(settings.output), requested, [settings.output], noted)
    return report


def _existing(settings: TrainingSettings, stream: TextIO | None) -> TrainingReport:
    """Report on the tokenizer that exists, if it is the one that the settings describe.

    Raises:
        UserError: it is another one; the message says how it differs.
    """
    try:
        report = read_note(
            note_path(settings.output),
            settings.determining_options,
            [settings.output],
            lambda records: compare_records(records, settings.sources, settings.read, stream),
        )
    except OutputDiffers as difference:
        problem = f"exists already, and not as this command makes it: {difference}"
        raise UserError(settings.output, problem, "choose another --output, or pass --overwrite") from None
    log = InvalidDocumentLog("skip", Counter(report.pop("skipped")))
    return TrainingReport(load_tokenizer(settings.output, settings.loaded_by), **report, log=log, existed=True)


def sample_texts(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Return texts of at most ``max_bytes`` UTF-8 bytes together, in order: all of them, or those of smallest hash.

    This takes one pass and bounded memory. Which texts are drawn does not depend on their order. At least one text is
    returned, even if it is larger than ``max_bytes``.
    """
    heap: list[tuple[int, int, str]] = []  # (minus hash, number, text): the largest hash goes first
    total = 0
    for number, text in enumerate(texts):
        encoded = text.encode()
        total += len(encoded)
        rank = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
        heapq.heappush(heap, (-rank, number, text))
        while total > max_bytes and len(heap) > 1:
            total -= len(heapq.heappop(heap)[2].encode())
    return [text for _, _, text in sorted(heap, key=lambda entry: entry[1])]


def _check(settings: TrainingSettings) -> None:
    """Refuse settings that cannot be met, before anything is read."""
    suffix = SUFFIXES[settings.kind]
    if settings.output.suffix != suffix:
        raise UserError(settings.output, f"a {settings.kind} tokenizer is a {suffix} file", f"name it NAME{suffix}")
    if settings.kind != "sentencepiece" and settings.algorithm != "bpe":
        how = "trained by bpe" if settings.kind == "huggingface" else "made without one"
        raise UserError("--algorithm", f"a {settings.kind} tokenizer is {how}", "use --kind sentencepiece")
    if same_file(settings.output, settings.sources):
        raise UserError(settings.output, "is an input and would be the output too", "choose another --output")
    if settings.max_text_bytes < 1:
        raise UserError("--max-text-mib", f"{settings.max_text_bytes >> 20} MiB of text to train on", "use at least 1")
    _check_size(settings)


def _check_size(settings: TrainingSettings) -> None:
    """Refuse a size of the vocabulary, or inputs, that the kind of tokenizer cannot have."""
    size, kind = settings.vocab_size, settings.kind
    if kind == "bytes":
        if size not in (None, BYTE_VOCABULARY):
            raise UserError("--vocab-size", f"{size}, but --kind bytes has {BYTE_VOCABULARY} tokens", "leave it out")
        if settings.sources:
            raise UserError("--input", "is not read for --kind bytes, which learns nothing", "leave it out")
    elif kind == "words":
        if size is not None and size < FEWEST_WORDS:
            raise UserError("--vocab-size", f"{size} tokens leave no room for words", f"use {FEWEST_WORDS} or more")
    elif size is None:
        raise UserError("--vocab-size", f"is missing, which --kind {kind} needs", "use 1000 or more")
    elif size <= BYTES:
        raise UserError("--vocab-size", f"{size} tokens; the {BYTES} bytes alone take as many", "use 1000 or more")


def _counted(
    settings: TrainingSettings, log: InvalidDocumentLog, progress: TextProgress, recorder: SourceRecorder
) -> Iterator[str]:
    """Yield the texts of the corpus, and count each in ``progress``."""
    for document in read_documents(settings.sources, settings.read, log, recorder):
        progress.advance(0, len(document.utf8), 1)
        yield document.text


def _train_sentencepiece(settings: TrainingSettings, texts: list[str]) -> bytes:
    """Train a SentencePiece model, and return the content of its file."""
    import sentencepiece

    model = io.BytesIO()
    sentences = (piece for text in texts for line in text.split("\n") for piece in PIECES_OF_LINE.findall(line))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=settings.vocab_size,
            model_type=settings.algorithm,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            split_digits=True,
            byte_fallback=True,
            num_threads=SENTENCEPIECE_THREADS,
            minloglevel=4,
        )
    except RuntimeError as error:
        raise _explain_sentencepiece(str(error), settings.vocab_size or 0) from error
    return model.getvalue()


def _explain_sentencepiece(message: str, vocab_size: int) -> UserError:
    """Turn the library's error into one that names the option."""
    where = f"--vocab-size {vocab_size}"
    if match := re.search(r"too high.*<= (\d+)", message):
        return _too_little_text(vocab_size, int(match[1]))
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            where, f"the bytes and characters of this corpus alone take {match[1]}", f"use at least {match[1]}, or more"
        )
    return UserError(where, f"SentencePiece cannot train: {message}", "check that the corpus holds ordinary text")


def _too_little_text(vocab_size: int, possible: int) -> UserError:
    """Return the error for a corpus that is too small for its vocabulary."""
    return UserError(
        f"--vocab-size {vocab_size}",
        f"the corpus is too small: it gives at most {possible} tokens",
        f"use at most {possible}, or more text",
    )


def _train_huggingface(settings: TrainingSettings, texts: list[str]) -> bytes:
    """Train a Hugging Face tokenizer, and return the content of its file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    assert settings.vocab_size is not None, "the settings are checked"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[GPT2_EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != settings.vocab_size:
        raise _too_little_text(settings.vocab_size, tokenizer.get_vocab_size())
    return tokenizer.to_str(pretty=True).encode() + b"\n"


_TRAINERS: dict[TrainedKind, Callable[[TrainingSettings, list[str]], bytes]] = {
    "sentencepiece": _train_sentencepiece,
    "huggingface": _train_huggingface,
    "words": lambda settings, texts: word_tokenizer(texts, settings.vocab_size),
    "bytes": lambda settings, texts: byte_tokenizer(),
}
