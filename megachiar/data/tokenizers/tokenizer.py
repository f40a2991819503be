"""Tokenizers behind one interface: SentencePiece, Hugging Face ``tokenizer.json`` and GPT-2's byte-level BPE.

The libraries (``sentencepiece``, ``tokenizers``) are the reference: ids are theirs, with one exception that holds for
all of them. Text is text: a control string that occurs in a document (``<s>``, ``<|endoftext|>``) is encoded as the
characters it is made of and never becomes a control id, or a web page could end a document or start a chat turn.

Nothing is added to the ids (no BOS, no EOS) and nothing is cut off, whatever the tokenizer's own file asks for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from megachiar.data.inputs.recognition import refuse_pointer
from megachiar.data.tokenizers.foreign import foreign_file, refuse_foreign, refuse_other_rules
from megachiar.errors import UserError

TokenizerKind = Literal["auto", "sentencepiece", "huggingface", "gpt2"]

GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
GPT2_EOD = "<|endoftext|>"
# The end-of-document token of a tokenizer.json, first match wins; anything else is named by ``eod_token``.
HUGGINGFACE_EOD = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)


class ControlTokenError(UserError):
    """A tokenizer makes a control token of ordinary text, so that this text cannot be encoded."""


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer.

    Attributes:
        kind: ``"sentencepiece"``, ``"huggingface"`` or ``"gpt2"``.
        path: the file or folder it was loaded from.
        vocab_size: largest id that can occur, plus one.
        eod_id: id of the end-of-document token, None where the vocabulary has none.
        unknown_id: id of the token for what the vocabulary does not have, None where it has none.
        fingerprint: ``"sha256:..."`` of the vocabulary file(s); equal fingerprints give equal ids.
        controls: id -> string of the tokens that never stand for text.
    """

    kind: str
    path: Path
    vocab_size: int
    eod_id: int | None
    unknown_id: int | None
    fingerprint: str
    controls: dict[int, str]

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of one text: a list or a one-dimensional array."""
        ...

    def encode_batch(self, texts: list[str]) -> list[Sequence[int]]:
        """Token ids of every text, each as ``encode`` gives them."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; control tokens are left out."""
        ...

    def known_ids(self) -> Sequence[int]:
        """Every id that has a token, in ascending order: a vocabulary may have holes below ``vocab_size``."""
        ...


def load_tokenizer(path: Path | str, kind: TokenizerKind = "auto", eod_token: str | int | None = None) -> Tokenizer:
    """Load the tokenizer at ``path``.

    Args:
        path: ``*.model`` (SentencePiece); ``*.json`` or a folder with ``tokenizer.json`` (Hugging Face); a folder with
            ``vocab.json`` and ``merges.txt``, or ``encoder.json`` and ``vocab.bpe``, or one of these files (GPT-2).
        kind: which of them it is; ``"auto"`` tells by the names.
        eod_token: the token that ends a document, by string or id, where the tokenizer's own is not wanted or cannot
            be told.

    Raises:
        UserError: no such file, a file that is not a tokenizer, or ``eod_token`` is not in its vocabulary.
    """
    path = Path(path)
    resolved = _resolve_kind(path, kind)
    if kind == "auto" and resolved == "gpt2":  # by its files alone; a kind that was named is believed
        _refuse_other_rules(path)
    loaders: dict[str, Callable[[Path, str | int | None], Tokenizer]] = {
        "sentencepiece": SentencePieceTokenizer.load,
        "huggingface": HuggingFaceTokenizer.load,
        "gpt2": HuggingFaceTokenizer.load_gpt2,
    }
    return loaders[resolved](path, eod_token)


def vocabulary_files(path: Path, kind: TokenizerKind) -> list[Path]:
    """The files that the tokenizer of this kind at ``path``, a file or a folder, consists of.

    Raises:
        UserError: there is no such tokenizer.
    """
    kind = _resolve_kind(path, kind)
    if kind == "gpt2":
        return list(_gpt2_files(path if path.is_dir() else path.parent))
    if path.is_dir():
        return [_single_model(path) if kind == "sentencepiece" else path / "tokenizer.json"]
    return [path]


def tokenizer_fingerprint(path: Path, kind: TokenizerKind) -> str:
    """The ``fingerprint`` of the tokenizer of this kind at ``path``, without loading it.

    Raises:
        UserError: there is no such tokenizer.
    """
    return _fingerprint([_read(file) for file in vocabulary_files(path, kind)])


class SentencePieceTokenizer:
    """A SentencePiece model. ``eod_id`` is its EOS unless named otherwise."""

    kind = "sentencepiece"

    def __init__(self, path: Path, model: bytes, eod_token: str | int | None = None):
        import sentencepiece

        try:
            if not model:
                raise RuntimeError("empty")  # the library takes it for a model without pieces
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            refuse_foreign(path, model)
            raise UserError(
                path, f"not a SentencePiece model ({len(model)} bytes)", "give the .model file that its trainer wrote"
            ) from error
        self.path = path
        self.fingerprint = _fingerprint([model])
        self.vocab_size = self._processor.vocab_size()
        pieces = {self._processor.id_to_piece(index): index for index in range(self.vocab_size)}
        if eod_token is not None:
            self.eod_id: int | None = _lookup(path, eod_token, pieces)
        else:
            self.eod_id = eos if (eos := self._processor.eos_id()) >= 0 else None
        self.unknown_id = unknown if (unknown := self._processor.unk_id()) >= 0 else None
        # The library itself never gives a piece of type CONTROL; an EOD that is an ordinary or user-defined piece is
        # what the guard is for.
        may_occur = self.eod_id is not None and not self._processor.is_control(self.eod_id)
        occurring = {self.eod_id: self._processor.id_to_piece(self.eod_id)} if may_occur else {}
        self._guard = ControlGuard(path, occurring, self._encode_plain)
        ids = range(self.vocab_size)
        self.controls = occurring | {i: self._processor.id_to_piece(i) for i in ids if self._processor.is_control(i)}
        self._model = model

    @classmethod
    def load(cls, path: Path, eod_token: str | int | None) -> SentencePieceTokenizer:
        """Load a ``.model`` file, or the one in the folder ``path``."""
        (file,) = vocabulary_files(path, "sentencepiece")
        return cls(file, _read(file), eod_token)

    def encode(self, text: str) -> list[int]:
        return self._guard.clean(text, self._processor.encode(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return list(map(self._guard.clean, texts, self._encode_plain(texts)))

    def definition(self) -> bytes:
        """The model as its file holds it."""
        return self._model

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(index) for index in ids])

    def known_ids(self) -> range:
        return range(self.vocab_size)

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)


class HuggingFaceTokenizer:
    """A tokenizer of the ``tokenizers`` library; GPT-2's BPE is one whose parts come from two files.

    Attributes:
        cuts_like_gpt2: words are what GPT-2's expression finds in the text as it is, and each is encoded by itself.
    """

    def __init__(self, kind: str, path: Path, tokenizer, contents: list[bytes], eod_token: str | int | None):
        """``tokenizer``: a ``tokenizers.Tokenizer``, owned by this from now on; ``contents``: of its files."""
        self.kind, self.path, self._tokenizer = kind, path, tokenizer
        self.fingerprint = _fingerprint(contents)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(path, "the vocabulary is empty", "give a trained tokenizer")
        self.vocab_size = max(vocabulary.values()) + 1
        _check_loses_no_bytes(path, tokenizer, vocabulary)
        self.eod_id = self._choose_eod(eod_token, vocabulary)
        self._make_plain()
        self.cuts_like_gpt2 = _cuts_like_gpt2(tokenizer)
        self.unknown_id = _unknown_id(tokenizer.model, vocabulary)  # may stand for any character
        added = tokenizer.get_added_tokens_decoder()
        special = {index: token.content for index, token in added.items() if token.special}
        self.controls = {index: content for index, content in special.items() if index != self.unknown_id}
        self._guard = ControlGuard(path, self.controls, self._encode_plain)

    @classmethod
    def load(cls, path: Path, eod_token: str | int | None) -> HuggingFaceTokenizer:
        """Load a ``tokenizer.json``, or the one in the folder ``path``."""
        import tokenizers

        (file,) = vocabulary_files(path, "huggingface")
        content = _read(file)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            refuse_foreign(file, content)
            raise UserError(
                file, f"not a Hugging Face tokenizer: {error}", "give the tokenizer.json its trainer wrote"
            ) from error
        return cls("huggingface", file, tokenizer, [content], eod_token)

    @classmethod
    def load_gpt2(cls, path: Path, eod_token: str | int | None) -> HuggingFaceTokenizer:
        """Load GPT-2's vocabulary and merges from the folder ``path``, or from the folder of the file ``path``."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        vocabulary_file, merges_file = vocabulary_files(path, "gpt2")
        contents = [_read(vocabulary_file), _read(merges_file)]
        vocabulary, merges = _parse_vocabulary(vocabulary_file, contents[0]), _parse_merges(merges_file, contents[1])
        try:
            tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                merges_file, f"does not fit {vocabulary_file.name}: {error}", "take both files from the same tokenizer"
            ) from error
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        if eod_token is None and GPT2_EOD in vocabulary:
            eod_token = GPT2_EOD
        return cls("gpt2", vocabulary_file.parent, tokenizer, contents, eod_token)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return list(map(self._guard.clean, texts, self._encode_plain(texts)))

    def definition(self) -> str:
        """A ``tokenizer.json`` of what encodes here."""
        return self._tokenizer.to_str()

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)

    def known_ids(self) -> list[int]:
        return sorted(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _choose_eod(self, eod_token: str | int | None, vocabulary: dict[str, int]) -> int | None:
        if eod_token is not None:
            return _lookup(self.path, eod_token, vocabulary)
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        return next((vocabulary[token] for token in HUGGINGFACE_EOD if token in special), None)

    def _make_plain(self) -> None:
        """Undo what a tokenizer file may ask for that would add, drop or change tokens of a document."""
        from tokenizers import AddedToken

        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None) is not None:
            self._tokenizer.model.dropout = None  # BPE dropout draws: the same text would give other ids each time
        if self.eod_id is not None:
            eod = AddedToken(self._tokenizer.id_to_token(self.eod_id), special=True, normalized=False)
            self._tokenizer.add_special_tokens([eod])
        self._tokenizer.encode_special_tokens = True  # "as ordinary text"


class ControlGuard:
    """Keeps control ids out of encoded text where a library lets them through.

    A unigram or word-level vocabulary holds its control tokens as ordinary entries, so that a literal ``</s>`` is
    looked up like a word. Such a text is cut inside each control string and its parts are encoded apart.
    """

    def __init__(self, path: Path, controls: dict[int, str], encode_plain: Callable[[list[str]], list[list[int]]]):
        """``controls``: id -> string that must not occur in text; ``encode_plain``: the library's own encoding."""
        self._path, self._controls, self._encode_plain = path, controls, encode_plain
        longest_first = sorted(filter(None, controls.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def clean(self, text: str, ids: list[int]) -> list[int]:
        """``ids`` of ``text`` if they hold no control id, otherwise the ids of the text cut inside control strings.

        Raises:
            ControlTokenError: a control id is left even then: the tokenizer makes it out of other characters.
        """
        if self._controls.keys().isdisjoint(ids):
            return ids
        cuts = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts) if start < end]
        apart = [index for part in self._encode_plain(parts) for index in part]
        left = sorted({self._controls[index] for index in self._controls.keys() & set(apart)})
        if left:
            raise ControlTokenError(
                self._path,
                f"encodes ordinary text as the control token {left[0]!r}",
                f"take {left[0]!r} out of the text, or use a tokenizer that has control tokens apart from its pieces",
            )
        return apart


def _refuse_other_rules(path: Path) -> None:
    folder = path if path.is_dir() else path.parent
    vocabulary_file, _ = _gpt2_files(folder)
    refuse_other_rules(folder, _parse_vocabulary(vocabulary_file, _read(vocabulary_file)))


def _resolve_kind(path: Path, kind: TokenizerKind) -> str:
    """Return ``kind``, told by the names where it is ``"auto"``, of a ``path`` that exists."""
    if not path.exists():
        raise UserError(path, "there is no such tokenizer file or folder", "check the path of the tokenizer")
    known = get_args(TokenizerKind)
    if kind not in known:
        raise UserError(path, f"unknown tokenizer kind {kind!r}", f"use one of {', '.join(known)}")
    return _kind_of(path) if kind == "auto" else kind


def _kind_of(path: Path) -> str:
    """Kind of the tokenizer at ``path``, by its name or by what the folder holds."""
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return "huggingface"
        if any((path / vocabulary).exists() and (path / merges).exists() for vocabulary, merges in GPT2_FILES):
            return "gpt2"
        if any(path.glob("*.model")):
            return "sentencepiece"
    elif path.name in {name for pair in GPT2_FILES for name in pair}:
        return "gpt2"
    elif ".model" in path.suffixes:  # also tokenizer.model.v3
        return "sentencepiece"
    elif path.suffix == ".json":
        return "huggingface"
    foreign = foreign_file(path) if path.is_dir() else path
    if foreign is not None:
        refuse_foreign(foreign, _read(foreign))
    raise UserError(
        path,
        "cannot tell what kind of tokenizer this is",
        "give a SentencePiece *.model, a tokenizer.json or a folder holding one, or a folder with vocab.json and "
        "merges.txt; or name the kind",
    )


def _single_model(folder: Path) -> Path:
    """The SentencePiece model of ``folder``: ``tokenizer.model``, or its only ``*.model``."""
    models = sorted(folder.glob("*.model"))
    preferred = folder / "tokenizer.model"
    if preferred in models:
        return preferred
    if len(models) != 1:
        raise UserError(folder, f"holds {len(models)} *.model files, expected one", "give the path of the file itself")
    return models[0]


def _gpt2_files(folder: Path) -> tuple[Path, Path]:
    """(vocabulary, merges) of a GPT-2 tokenizer in ``folder``."""
    for vocabulary, merges in GPT2_FILES:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            return folder / vocabulary, folder / merges
    wanted = " or ".join(f"{vocabulary} with {merges}" for vocabulary, merges in GPT2_FILES)
    raise UserError(folder, f"a GPT-2 tokenizer needs {wanted}", "put both files into one folder")


def _parse_vocabulary(path: Path, content: bytes) -> dict[str, int]:
    """Token -> id of a GPT-2 ``vocab.json``."""
    refuse_pointer(path, content)
    try:
        vocabulary = json.loads(content)
    except ValueError as error:
        raise UserError(path, f"broken JSON: {error}", "fetch the vocabulary again") from error
    valid = isinstance(vocabulary, dict) and all(type(index) is int and index >= 0 for index in vocabulary.values())
    if not valid or len(set(vocabulary.values())) != len(vocabulary):
        raise UserError(path, "not a map from tokens to distinct ids", "give GPT-2's vocab.json or encoder.json")
    return vocabulary


def _parse_merges(path: Path, content: bytes) -> list[tuple[str, str]]:
    """Pairs of a GPT-2 ``merges.txt``, in order of rank."""
    refuse_pointer(path, content)
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(path, f"byte {error.start} is not UTF-8", "fetch the merges again") from error
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.split(" ")
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2:
            raise UserError(f"{path}:{number}", f"expected two tokens, got {line[:60]!r}", "fetch the merges again")
        merges.append((pair[0], pair[1]))
    return merges


def _unknown_id(model: Any, vocabulary: dict[str, int]) -> int | None:
    """Id of what stands for an unknown character in a model of ``tokenizers``."""
    if hasattr(model, "unk_token"):
        return vocabulary.get(model.unk_token)
    return json.loads(model.__getstate__()).get("unk_id")  # a unigram model tells it nowhere else


def _cuts_like_gpt2(tokenizer: Any) -> bool:
    from tokenizers import models, pre_tokenizers

    cut, added = tokenizer.pre_tokenizer, tokenizer.get_added_tokens_decoder().values()
    return (
        isinstance(tokenizer.model, models.BPE)
        and isinstance(cut, pre_tokenizers.ByteLevel)
        and cut.use_regex
        and not cut.add_prefix_space
        and tokenizer.normalizer is None
        and all(token.special for token in added)  # which are looked for in no text here
    )


def _check_loses_no_bytes(path: Path, tokenizer: Any, vocabulary: dict[str, int]) -> None:
    """Refuse a byte-level BPE whose vocabulary lacks bytes: the library would drop them from text without a word."""
    from tokenizers import models, pre_tokenizers

    model = tokenizer.model
    parts = [part.__getstate__() for part in (tokenizer.pre_tokenizer, tokenizer.normalizer) if part is not None]
    if not isinstance(model, models.BPE) or not any(b'"ByteLevel"' in part for part in parts):
        return
    if model.unk_token or model.byte_fallback:
        return
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys()
    if missing:
        raise UserError(
            path,
            f"the byte-level vocabulary lacks {len(missing)} of the 256 bytes: text with them would lose characters",
            "train it with the whole byte alphabet, as `megachiar tokenizer` does",
        )


def _lookup(path: Path, token: str | int, vocabulary: dict[str, int]) -> int:
    """The id of ``token``, a string or itself an id."""
    is_there = token in vocabulary if isinstance(token, str) else token in vocabulary.values()
    if not is_there:
        raise UserError(
            path,
            f"the end-of-document token {token!r} is not in the vocabulary",
            "name a token that the vocabulary has",
        )
    return vocabulary[token] if isinstance(token, str) else token


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            path, f"cannot read the tokenizer: {error.strerror}", "check the path and its permissions"
        ) from error


def _fingerprint(contents: list[bytes]) -> str:
    """``sha256:...`` of one file as ``sha256sum`` prints it; of several, the hash of their hashes."""
    digests = [hashlib.sha256(content) for content in contents]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digest.digest() for digest in digests))
    return f"sha256:{whole.hexdigest()}"
