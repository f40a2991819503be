"""Train a tokenizer on a corpus: the engine behind ``megachiar tokenizer``.

Both kinds encode any text and give it back, character for character:

* SentencePiece: no normalization, no dummy prefix, no whitespace removed; ``\\n`` is a piece of its own, digits are
  split, and a character that is not in the vocabulary becomes its UTF-8 bytes. One character is the exception, and the
  library's: U+2581 (``▁``), its mark for a space, comes back as a space.
* Hugging Face: byte-level BPE with GPT-2's splitting and all 256 bytes in the vocabulary.

The same input and options give the same file, byte for byte. A note ``NAME.made`` beside it says what they were, so
that the same command, given again, does nothing.
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from megachiar.data.inputs.documents import InvalidDocumentLog, OnError, ReadOptions
from megachiar.data.inputs.find_inputs import same_file
from megachiar.data.inputs.folder_files import FoundFiles
from megachiar.data.inputs.readers import read_documents
from megachiar.data.inputs.source import Source
from megachiar.data.preprocessing.existing import Differs, note_path, read_note, write_note
from megachiar.data.storage.files import write_atomically
from megachiar.data.tokenizers.gpt2_files import GPT2_EOD
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError, disk_errors
from megachiar.interrupts import interrupts_go_to
from megachiar.progress import TextProgress

TrainedKind = Literal["sentencepiece", "huggingface"]
Algorithm = Literal["bpe", "unigram"]

SUFFIXES: dict[TrainedKind, str] = {"sentencepiece": ".model", "huggingface": ".json"}
BYTES = 256
# SentencePiece skips sentences above 4,192 bytes without a word, and its results change with its threads.
LONGEST_SENTENCE = 1000  # characters of up to 4 bytes
SENTENCEPIECE_THREADS = 16
PIECES_OF_LINE = re.compile(rf".{{1,{LONGEST_SENTENCE}}}(?=\s|$)|.{{1,{LONGEST_SENTENCE}}}")


@dataclass(frozen=True)
class TrainingSettings:
    """What tokenizer to train, and on what.

    Attributes:
        sources: the corpus.
        output: the file to write, ``.model`` or ``.json`` by ``kind``.
        vocab_size: tokens of the vocabulary, special ones and the 256 bytes included; exactly met.
        kind, algorithm: SentencePiece can do both algorithms, Hugging Face does BPE.
        read: how documents are found.
        max_text_bytes: train on a sample of at most so much text, documents drawn evenly from the whole corpus.
        on_error: what an unusable document does.
        overwrite: replace ``output`` if it exists.
        found: what folders and globs among the inputs gave, to be told.
    """

    sources: list[Source]
    output: Path
    vocab_size: int
    kind: TrainedKind = "sentencepiece"
    algorithm: Algorithm = "bpe"
    read: ReadOptions = field(default_factory=ReadOptions)
    max_text_bytes: int = 200 << 20
    on_error: OnError = "refuse"
    overwrite: bool = False
    found: list[FoundFiles] = field(default_factory=list)

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides the file that is written: options, and the inputs as they are now."""
        return {
            "vocab_size": self.vocab_size,
            "kind": self.kind,
            "algorithm": self.algorithm,
            "text_key": self.read.text_key,
            "txt_documents": self.read.txt_documents,
            "max_text_bytes": self.max_text_bytes,
            "on_error": self.on_error,
            "inputs": [source.identity() for source in self.sources],
        }


class TrainingReport(NamedTuple):
    """The tokenizer as written, the documents and bytes of text it was trained on and read in all, what was skipped.

    ``existed`` tells that the tokenizer was there already, made by the same call, and nothing was done.
    """

    tokenizer: Tokenizer
    used_documents: int
    used_bytes: int
    read_documents: int
    read_bytes: int
    log: InvalidDocumentLog
    existed: bool = False


def train_tokenizer(settings: TrainingSettings, stream: TextIO | None = None) -> TrainingReport:
    """Train a tokenizer and write it, whole or not at all; do nothing where the same call has done it before.

    Args:
        settings: what to train.
        stream: where progress is shown, standard error if None.

    Raises:
        UserError: the output has the wrong suffix, or exists and was not made by the same call; the corpus cannot be
            read or is too small for the vocabulary, the vocabulary is too small for the corpus, or the disk is full.
    """
    with disk_errors(settings.output):
        _check(settings)
        exists = settings.output.exists()
    if exists and not settings.overwrite:
        return _existing(settings)
    for line in itertools.chain.from_iterable(found.lines() for found in settings.found):
        print(line, file=stream or sys.stderr)
    log = InvalidDocumentLog(settings.on_error)
    asked = settings.deciding
    with TextProgress("reading", None, stream) as progress:
        sample = sample_texts(_counted(settings, log, progress), settings.max_text_bytes)
    if not sample:
        raise UserError("--input", "held no usable document", "check the input and --text-key")
    print(f"training on {len(sample):,} of {progress.documents:,} documents", file=stream or sys.stderr)
    train = _train_sentencepiece if settings.kind == "sentencepiece" else _train_huggingface
    # Ctrl-C ends the process at once: the trainers run for minutes without looking, and nothing is written yet.
    with interrupts_go_to(signal.SIG_DFL):
        content = train(settings, sample)
    write_atomically(settings.output, content)
    counts = {
        "used_documents": len(sample),
        "used_bytes": sum(len(text.encode()) for text in sample),
        "read_documents": progress.documents,
        "read_bytes": progress.text_bytes,
    }
    write_note(note_path(settings.output), asked, [settings.output], {**counts, "skipped": dict(log.counts)})
    return TrainingReport(load_tokenizer(settings.output, settings.kind), **counts, log=log)


def _existing(settings: TrainingSettings) -> TrainingReport:
    """Report on the tokenizer that is there if it is the one that the settings ask for.

    Raises:
        UserError: it is another one; the message says how it differs.
    """
    try:
        report = read_note(note_path(settings.output), settings.deciding, [settings.output])
    except Differs as difference:
        problem = f"exists already, and not as this command makes it: {difference}"
        raise UserError(settings.output, problem, "choose another --output, or pass --overwrite") from None
    log = InvalidDocumentLog("skip", Counter(report.pop("skipped")))
    return TrainingReport(load_tokenizer(settings.output, settings.kind), **report, log=log, existed=True)


def sample_texts(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Texts of at most ``max_bytes`` UTF-8 bytes in all, in their order: all of them, or those of smallest hash.

    One pass and bounded memory; which texts are drawn does not depend on their order. There is always one, if it be
    larger than ``max_bytes``.
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
    suffix = SUFFIXES[settings.kind]
    if settings.output.suffix != suffix:
        raise UserError(settings.output, f"a {settings.kind} tokenizer is a {suffix} file", f"name it NAME{suffix}")
    if settings.kind == "huggingface" and settings.algorithm != "bpe":
        raise UserError("--algorithm", "a huggingface tokenizer is trained by bpe", "use --kind sentencepiece")
    if same_file(settings.output, settings.sources):
        raise UserError(settings.output, "is an input and would be the output too", "choose another --output")
    if settings.max_text_bytes < 1:
        raise UserError("--max-text-mib", f"{settings.max_text_bytes >> 20} MiB of text to train on", "use at least 1")
    if settings.vocab_size <= BYTES:
        raise UserError(
            "--vocab-size", f"{settings.vocab_size} tokens; the {BYTES} bytes alone take as many", "use 1000 or more"
        )


def _counted(settings: TrainingSettings, log: InvalidDocumentLog, progress: TextProgress) -> Iterator[str]:
    """Texts of the corpus, each told to ``progress``."""
    for document in read_documents(settings.sources, settings.read, log):
        progress.advance(0, len(document.utf8), 1)
        yield document.text


def _train_sentencepiece(settings: TrainingSettings, texts: list[str]) -> bytes:
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
        raise _explain_sentencepiece(str(error), settings.vocab_size) from error
    return model.getvalue()


def _explain_sentencepiece(message: str, vocab_size: int) -> UserError:
    """The library's words in ours."""
    where = f"--vocab-size {vocab_size}"
    if match := re.search(r"too high.*<= (\d+)", message):
        return _too_little_text(vocab_size, int(match[1]))
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            where, f"the bytes and characters of this corpus alone take {match[1]}", f"use at least {match[1]}, or more"
        )
    return UserError(where, f"SentencePiece cannot train: {message}", "check that the corpus holds ordinary text")


def _too_little_text(vocab_size: int, possible: int) -> UserError:
    return UserError(
        f"--vocab-size {vocab_size}",
        f"the corpus is too small: it gives at most {possible} tokens",
        f"use at most {possible}, or more text",
    )


def _train_huggingface(settings: TrainingSettings, texts: list[str]) -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
