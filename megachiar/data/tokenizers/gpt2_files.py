"""Read GPT-2's vocabulary and merges, two files that do not name the rules they belong to."""

from __future__ import annotations

from pathlib import Path

from megachiar.data.inputs.recognition import refuse_pointer
from megachiar.data.storage.sealed_json import parse_json
from megachiar.data.tokenizers.unsupported import refuse_other_rules
from megachiar.data.tokenizers.vocabulary_files import gpt2_files, read_file
from megachiar.errors import UserError

GPT2_EOD = "<|endoftext|>"


def check_gpt2_rules(path: Path) -> None:
    """Check that the files at ``path``, which have the names of GPT-2's, belong to GPT-2's rules.

    Args:
        path: the folder of the files, or one of them.

    Raises:
        UserError: they belong to other rules, or cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    vocabulary_file, _ = gpt2_files(folder)
    refuse_other_rules(folder, parse_vocabulary(vocabulary_file, read_file(vocabulary_file)))


def parse_vocabulary(path: Path, content: bytes) -> dict[str, int]:
    """Return token -> id of a GPT-2 ``vocab.json``.

    Raises:
        UserError: ``content`` is no map from tokens to distinct ids.
    """
    refuse_pointer(path, content)
    try:
        vocabulary = parse_json(content)
    except ValueError as error:
        raise UserError(path, f"holds broken JSON: {error}", "fetch the vocabulary again") from error
    valid = isinstance(vocabulary, dict) and all(type(index) is int and index >= 0 for index in vocabulary.values())
    if not valid or len(set(vocabulary.values())) != len(vocabulary):
        raise UserError(path, "is not a map from tokens to distinct ids", "give GPT-2's vocab.json or encoder.json")
    return vocabulary


def parse_merges(path: Path, content: bytes) -> list[tuple[str, str]]:
    """Return the pairs of a GPT-2 ``merges.txt``, in order of rank.

    Raises:
        UserError: ``content`` is not UTF-8, or a line does not hold two tokens.
    """
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
