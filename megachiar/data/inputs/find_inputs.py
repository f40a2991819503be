"""Which files a command line names: files, globs, folders, URLs, standard input; and what is left out of a folder.

A folder gives every file in it, at any depth and through links, whose name tells a format that is read. A ``.json``
file may be data or settings: it is read where its first record is an object on a line of its own and has the text's
key. What looks like text data but cannot be read is refused, and all else is told as left out.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megachiar.data.inputs import remote
from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.folder_walk import LeftOut, walk
from megachiar.data.inputs.recognition import HEAD_BYTES, describe, json_layout, looks_like_text, refuse_what_is_no_text
from megachiar.data.inputs.source import (
    COMPRESSIONS,
    STANDARD_INPUT,
    SUFFIXES,
    Source,
    format_of,
    known_suffixes,
    make_source,
    split_format,
)
from megachiar.data.inputs.text_reader import first_bytes
from megachiar.errors import UserError, disk_errors

DATA_SUFFIXES = {
    *(".csv", ".tsv", ".arrow", ".feather", ".avro", ".orc", ".tfrecord", ".mds", ".warc", ".wet", ".wat"),
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"),
    *(".lz4", ".lzma", ".lzo", ".sz", ".snappy", ".br", ".zstd"),
}
"""Suffixes of files that hold data of a kind that is not read."""
BESIDE_DATA = {
    *(".md5", ".sha1", ".sha256", ".sha512", ".crc", ".asc", ".sig", ".lock", ".log", ".idx", ".index", ".metadata"),
    ".done",
}
"""Suffixes of what stands beside a data file under its name."""
NOTES = re.compile(
    r"(readme|licen[cs]e|copying|copyright|notice|authors|contributors|contributing|changelog|changes|news|todo|version|"
    r"manifest|makefile|dockerfile|_success|_started|_committed.*|(sha|md)\d+sums?|checksums?)$"
)
"""Names without suffix, in lower case, of text that is no data."""
JSON_HEAD_BYTES = 1 << 16  # looked at to tell data from settings
NAMED = 5  # files that a message names


@dataclass
class FoundFiles:
    """What a folder or a glob gave.

    Attributes:
        pattern: the folder or glob as it was named.
        sources: the files that are read, in order.
        left_out: the other files and folders, by their paths in the folder.
    """

    pattern: str
    sources: list[Source] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def told(self) -> str:
        """Which files are read, in a line."""
        names = [source.name.removeprefix(f"{self.pattern}/") for source in self.sources]
        kinds = Counter(".".join(filter(None, (source.format, source.compression))) for source in self.sources)
        told = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        return f"{self.pattern}: {_files(len(names))} read ({told}): {_some(names)}"

    def lines(self) -> Iterator[str]:
        """What is read and what is not, for people to read."""
        yield self.told()
        reasons: dict[str, list[str]] = {}
        for file in self.left_out:
            reasons.setdefault(file.reason, []).append(file.name)
        for reason, left_out in sorted(reasons.items()):
            yield f"{self.pattern}: {len(left_out):,} left out, {reason}: {_some(left_out)}"


@dataclass
class Inputs:
    """The corpus that a command line names: all sources in order, and what each folder or glob gave."""

    sources: list[Source] = field(default_factory=list)
    found: list[FoundFiles] = field(default_factory=list)


class _Unreadable(NamedTuple):
    """A file of a folder that looks like text data but cannot be read: its path in the folder, why, and the remedy."""

    name: str
    problem: str
    remedy: str


def find_sources(patterns: Iterable[str | Path], format: str | None = None) -> list[Source]:
    """The sources of ``find_inputs``."""
    return find_inputs(patterns, format).sources


def find_inputs(
    patterns: Iterable[str | Path], format: str | None = None, text_key: str = ReadOptions().text_key
) -> Inputs:
    """The inputs named by ``patterns``, in their order; what one glob or folder gives is sorted by name.

    Args:
        patterns: files, globs (``**`` too), folders or ``-`` for standard input.
        format: one of FORMATS, for all of them and all files of a folder; None tells by the suffix, and takes standard
            input for jsonl.
        text_key: tells ``.json`` files of a folder that are data.

    Raises:
        UserError: nothing matches, a suffix is not known, a file is named twice, or a folder holds what looks like
            text data but cannot be read.
    """
    inputs = Inputs()
    for pattern in map(str, patterns):
        found = _expand(pattern, format, text_key)
        inputs.sources += found.sources
        if found.left_out or os.path.isdir(pattern):
            inputs.found.append(found)
    if not inputs.sources:
        raise UserError("--input", "no input was named", "give files, globs, folders or - for standard input")
    _refuse_doubles(inputs.sources)
    return inputs


def same_file(path: Path, sources: Iterable[Source]) -> bool:
    """Whether ``path`` is one of the files that are read.

    Raises:
        UserError: one of them cannot be looked at.
    """
    try:
        found = os.stat(path)
    except OSError:  # it is not there: nothing that is read can be the same
        return False
    for source in sources:
        if source.path is not None:
            with disk_errors(source.name, "read"):
                if os.path.samestat(found, os.stat(source.path)):
                    return True
    return False


def _expand(pattern: str, format: str | None, text_key: str) -> FoundFiles:
    """What one pattern names."""
    path = Path(pattern)
    if remote.is_url(pattern):
        return FoundFiles(pattern, list(_remote_sources(pattern, format)))
    if pattern == STANDARD_INPUT:
        kind, compression = split_format(format or "jsonl")
        if kind == "parquet":
            raise UserError("standard input", "parquet is read from its end, which a pipe has not", "give the file")
        return FoundFiles(pattern, [Source(None, kind, compression)])
    with disk_errors(pattern, "read"):
        if path.is_dir():
            return _folder_files(path, format, text_key)
        if path.exists():
            return FoundFiles(pattern, [make_source(path, format)])
        return _glob_files(pattern, format)


def _remote_sources(pattern: str, format: str | None) -> Iterator[Source]:
    for url in remote.expand(pattern):
        found = make_source(Path(url.partition("::")[0]), format)
        yield Source(None, found.format, found.compression, url)


def _folder_files(folder: Path, format: str | None, text_key: str) -> FoundFiles:
    """Files of ``folder`` that are read, and what is left out."""
    names, left_out = walk(str(folder))
    found, unreadable = FoundFiles(str(folder), [], left_out), []
    for name in names:
        verdict = make_source(folder / name, format) if format else _judge(folder, name, text_key)
        if isinstance(verdict, Source):
            found.sources.append(verdict)
        else:
            (unreadable if isinstance(verdict, _Unreadable) else left_out).append(verdict)
    unreadable += [
        _Unreadable(file.name, file.reason, "mend the link")
        for file in left_out
        if file.reason.startswith("a broken link") and (format or format_of(file.name))
    ]
    if unreadable:
        raise _refusal(folder, unreadable)
    if not found.sources:
        told = "; ".join(line.partition(": ")[2] for line in list(found.lines())[1:])
        problem = "holds no file of a known format" + (f": {told}" if told else "")
        raise UserError(folder, problem, f"known suffixes: {known_suffixes()}; or name files by a glob with --format")
    return found


def _refusal(folder: Path, files: list[_Unreadable]) -> UserError:
    told = ", ".join(f"{file.name} ({file.problem})" for file in files[:NAMED])
    more = f" and {len(files) - NAMED:,} more" if len(files) > NAMED else ""
    remedies = "; ".join(dict.fromkeys(file.remedy for file in files[:NAMED]))
    return UserError(
        folder,
        f"holds {_files(len(files))} of what looks like text data, but cannot be read: {told}{more}",
        f"{remedies}; or leave {'it' if len(files) == 1 else 'them'} out by a quoted glob that names what to read, "
        f"such as '{folder}/**/*.jsonl'",
    )


def _judge(folder: Path, name: str, text_key: str) -> Source | LeftOut | _Unreadable:
    """What becomes of a file of a folder: it is read, left out or refused."""
    known, path = format_of(name.rpartition("/")[2]), Path(f"{folder}/{name}")
    if known is not None:
        source = Source(path, *known)
        is_json = known[0] == "jsonl" and name.lower().removesuffix(f".{known[1]}").endswith(".json")
        return _judge_json(source, name, text_key) if is_json else source
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    by_format = "pass --format, which reads every file of the folder alike, or give it a suffix that is known"
    if last in BESIDE_DATA:
        return LeftOut(name, f"suffix {last}")
    if DATA_SUFFIXES & set(suffixes[-2:]):
        return _Unreadable(name, f"{''.join(suffixes[-2:])} is not read", "make jsonl, txt or parquet of it")
    if last in COMPRESSIONS:
        return _Unreadable(name, f"its name does not tell what {last} holds", by_format)
    if any(suffix in SUFFIXES for suffix in suffixes[:-1]):
        return _Unreadable(name, f"{last} after a suffix of text", by_format)
    has_suffix = bool(last) and not last[1:].isdecimal()
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    what = describe(head)
    if what is None and _has_key(head, text_key) and json_layout(head) != "other":
        what = "JSON"
    if (
        what is None
        and not has_suffix
        and head.strip()
        and looks_like_text(head)
        and not NOTES.match(path.name.lower())
    ):
        what = "text"
    if what is not None and not (has_suffix and what in ("a web page", "a PDF", "an SQLite database")):
        return _Unreadable(name, f"{what}, suffix {last or 'missing'}", by_format)
    return LeftOut(name, f"suffix {last}" if last else "no suffix")


def _judge_json(source: Source, name: str, text_key: str) -> Source | LeftOut | _Unreadable:
    """Tell data from settings among ``.json`` files."""
    try:
        head = first_bytes(source, JSON_HEAD_BYTES)
        if not _has_key(head, text_key) and describe(head) is None:
            return LeftOut(name, f".json without {text_key!r} in it")
        refuse_what_is_no_text(source, head)
    except UserError as error:
        return _Unreadable(name, error.problem, error.remedy)
    return source if json_layout(head) == "lines" else LeftOut(name, ".json that is not an object a line")


def _has_key(head: bytes, key: str) -> bool:
    return re.search(re.escape(json.dumps(key, ensure_ascii=False).encode()) + rb"\s*:", head) is not None


def _glob_files(pattern: str, format: str | None) -> FoundFiles:
    """Files that a glob matches."""
    names, folders = _matches(pattern)
    if not names:
        problem = "the glob matches no file" if glob.has_magic(pattern) else "there is no such file"
        raise UserError(pattern, problem, "check the path; quote globs so that they reach this program")
    left_out = [LeftOut(folder, "a folder, which a glob does not read") for folder in folders]
    return FoundFiles(pattern, [make_source(Path(name), format) for name in names], left_out)


def _matches(pattern: str) -> tuple[list[str], list[str]]:
    """(files, folders that no ``**`` goes into) that a glob matches, sorted."""
    parts = pattern.split("/")
    if "**" not in parts:
        names = sorted(glob.glob(pattern), key=_in_order)
        return [name for name in names if not os.path.isdir(name)], [name for name in names if os.path.isdir(name)]
    first = parts.index("**")
    base, rest = "/".join(parts[:first]) + "/" * (first > 0), parts[first:]
    files = []
    for root in glob.glob(base) if base else [""]:
        found, _ = walk(root or ".", enters_hidden=any(part.startswith(".") for part in rest))
        files += [root + name for name in found if _fits(name.split("/"), rest)]
    return sorted(files, key=_in_order), []


def _fits(names: list[str], patterns: list[str]) -> bool:
    """Whether the parts of a path match those of a glob: ``**`` any number of parts, nothing what begins with a dot."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        visible = next((n for n, name in enumerate(names) if name.startswith(".")), len(names))
        return any(_fits(names[n:], patterns[1:]) for n in range(visible + 1))
    hidden = bool(names) and names[0].startswith(".") and not patterns[0].startswith(".")
    return bool(names) and not hidden and fnmatch.fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def _in_order(name: str) -> list[str]:
    """What paths are sorted by: folder after folder."""
    return name.split("/")


def _refuse_doubles(sources: list[Source]) -> None:
    """Refuse a file that is named twice, also by way of links."""
    real = _make_real()
    seen: set[str | None] = set()
    for source in sources:
        identity = real(str(source.path)) if source.path is not None else source.url
        if identity in seen:
            raise UserError(source.name, "named twice: its documents would be doubled", "name each input once")
        seen.add(identity)


def _make_real() -> Callable[[str], str]:
    """``os.path.realpath`` that resolves each folder once."""
    folders: dict[str, str] = {}

    def real(path: str) -> str:
        if os.path.islink(path):
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.join(folders[folder], name)

    return real


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


def _some(names: list[str]) -> str:
    """The first few of ``names``, and the last one."""
    return ", ".join(names) if len(names) <= NAMED else f"{', '.join(names[: NAMED - 2])}, ... {names[-1]}"
