"""Recognise tokenizer files that cannot be used, or would be used with the wrong rules, and name the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megachiar.data.inputs.recognition import HEAD_BYTES, describe, refuse_pointer
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_json
from megachiar.errors import UserError

TIKTOKEN_LINES = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")
GPT2_FAMILIES = {"gpt2", "roberta", "bart", "longformer", "led", "opt", "codegen", "blenderbot", "deberta"}
"""Families of models whose vocab.json and merges.txt belong to GPT-2's rule for cutting text into words."""
NEVER_IN_GPT2 = re.compile(r"[!-/:-@\[-`{-~]Ċ|</w>$")
"""Text that no token of GPT-2 has: a line end after punctuation, which its rule cuts apart, or CLIP's end mark."""
GUESSED = ("UTF-16LE text", "UTF-16BE text")  # guessed by zero bytes, which a binary model has too
TAKE_JSON = (
    "take the tokenizer.json of the same model; if it has none, make it: AutoTokenizer.from_pretrained(FOLDER)"
    ".save_pretrained(OTHER) of the package transformers"
)


def refuse_unsupported(path: Path, content: bytes) -> None:
    """Name the kind of a file that no library reads as a tokenizer, if it can be recognised.

    Raises:
        UserError: ``content`` is a vocabulary of tiktoken or tekken, a pointer of git-LFS, or no tokenizer at all.
    """
    head = content[:HEAD_BYTES]
    refuse_pointer(path, head)
    if TIKTOKEN_LINES.match(head):
        raise UserError(path, "is a vocabulary of tiktoken, which does not tell how text is cut into words", TAKE_JSON)
    if (what := describe(head)) is not None and what not in GUESSED:
        raise UserError(path, f"is not a tokenizer, but {what}", "give the file of the tokenizer itself")
    if head.lstrip().startswith(b"{"):
        _refuse_other_json(path, content)


def find_unsupported_file(folder: Path) -> Path | None:
    """Return a file of ``folder`` that may be a tokenizer of an unsupported kind; None if there is none."""
    found: Iterable[Path] = (*sorted(folder.glob("tekken*.json")), *sorted(folder.glob("*.tiktoken")))
    return next(iter(found), None)


def refuse_other_rules(folder: Path, vocabulary: Iterable[str]) -> None:
    """Refuse vocab.json and merges.txt in ``folder`` that belong to another rule than GPT-2's.

    Raises:
        UserError: the files beside them name another family of tokenizers, or ``vocabulary`` has tokens that GPT-2's
            rule never gives.
    """
    for name, key in (("tokenizer_config.json", "tokenizer_class"), ("config.json", "model_type")):
        named = _string_in_json(folder / name, key)
        if named is None:
            continue
        family = named.lower().removesuffix("fast").removesuffix("tokenizer")
        if family in GPT2_FAMILIES:
            break
        if family != "pretrained":
            problem = f"{name} names {named}, whose rule for cutting text into words may be another than GPT-2's"
            raise UserError(folder, problem, f"{TAKE_JSON}; or name the kind gpt2 if it is GPT-2's rule")
    token = next((token for token in vocabulary if NEVER_IN_GPT2.search(token)), None)
    if token is not None:
        problem = f"its vocabulary has the token {token!r}, which GPT-2's rule for cutting text into words never gives"
        raise UserError(folder, problem, TAKE_JSON)


def _refuse_other_json(path: Path, content: bytes) -> None:
    """Refuse a JSON file that is a vocabulary of tekken or the settings of a tokenizer."""
    try:
        described = parse_json(content)
    except ValueError:  # the loader reports the defect
        return
    if not isinstance(described, dict) or "model" in described:
        return
    vocabulary = described.get("vocab")
    if isinstance(vocabulary, list) and vocabulary and "token_bytes" in vocabulary[0]:
        raise UserError(path, "is a vocabulary of tekken (mistral-common), which is not read", TAKE_JSON)
    if "tokenizer_class" in described or "added_tokens_decoder" in described:
        raise UserError(
            path, "holds settings of a tokenizer, not its vocabulary", f"give tokenizer.json beside it, or {TAKE_JSON}"
        )


def _string_in_json(path: Path, key: str) -> str | None:
    """Return the string under ``key`` of a JSON file; None where there is no such file or no such string."""
    try:
        described: Any = parse_json(read_regular(path))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise UserError(path, f"cannot read: {error.strerror}", "make it readable") from error
    value = described.get(key) if isinstance(described, dict) else None
    return value if isinstance(value, str) else None
