"""What a folder gives: the files that are read, what is left out, and what is refused.

A folder gives every file in it, at any depth and through links, whose name tells a format that is read. A ``.json``
file may be data or settings: it is read where its first record is an object on a line of its own and has a string
under the text's key. What looks like text data but cannot be read is refused, and all else is told as left out.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megachiar.data.inputs.folder_walk import LeftOut, walk
from megachiar.data.inputs.own_files import find_own_files
from megachiar.data.inputs.recognition import HEAD_BYTES, describe, json_layout, looks_like_text, refuse_what_is_no_text
from megachiar.data.inputs.source import COMPRESSIONS, SUFFIXES, Source, format_of, known_suffixes, make_source
from megachiar.data.inputs.text_reader import first_bytes
from megachiar.errors import UserError

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
NO_DATA = ("a web page", "a PDF", "an SQLite database")
"""What a file with a suffix of its own may be without being data."""
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


class _Unreadable(NamedTuple):
    """A file of a folder that looks like text data but cannot be read: its path in the folder, why, and the remedy."""

    name: str
    problem: str
    remedy: str


def folder_files(folder: Path, format: str | None, text_key: str) -> FoundFiles:
    """The files of ``folder`` that are read, and what is left out.

    Args:
        format: of all files, one of FORMATS; None tells by their suffixes.
        text_key: tells ``.json`` files that are data.

    Raises:
        UserError: the folder holds what looks like text data but cannot be read, or nothing that is read.
    """
    names, left_out = walk(str(folder))
    found, unreadable = FoundFiles(str(folder), [], left_out), []
    own = find_own_files(folder, names)
    for name in names:
        if name in own:
            left_out.append(LeftOut(name, own[name]))
            continue
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
    what = _data_in(path, last, text_key)
    if what is not None:
        return _Unreadable(name, f"{what}, suffix {last or 'missing'}", by_format)
    return LeftOut(name, f"suffix {last}" if last else "no suffix")


def _data_in(path: Path, suffix: str, text_key: str) -> str | None:
    """What data a file under a suffix that is not known seems to hold, None if none: an image, a note, a program."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    what, has_suffix = describe(head), bool(suffix) and not suffix[1:].isdecimal()
    if what is not None:
        return None if has_suffix and what in NO_DATA else what
    if _has_text(head, text_key) and json_layout(head) != "other":
        return "JSON"
    is_note = has_suffix or NOTES.match(path.name.lower()) is not None
    return None if is_note or not head.strip() or not looks_like_text(head) else "text"


def _judge_json(source: Source, name: str, text_key: str) -> Source | LeftOut | _Unreadable:
    """Tell data from settings among ``.json`` files."""
    try:
        head = first_bytes(source, JSON_HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
        if not _has_text(head, text_key) and describe(head) is None:
            return LeftOut(name, f".json without {text_key!r} in it")
        refuse_what_is_no_text(source, head)
    except UserError as error:
        return _Unreadable(name, error.problem, error.remedy)
    return source if json_layout(head) == "lines" else LeftOut(name, ".json that is not an object a line")


def _has_text(head: bytes, key: str) -> bool:
    """Whether JSON that begins with ``head`` has a string under ``key``: in its first line if that is an object."""
    line = head.lstrip().partition(b"\n")[0]
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # it goes on beyond this line
        name = re.escape(json.dumps(key, ensure_ascii=False).encode())
        return re.search(name + rb'\s*:\s*"', head) is not None
    return isinstance(record, dict) and isinstance(record.get(key), str)


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


def _some(names: list[str]) -> str:
    """The first few of ``names``, and the last one."""
    return ", ".join(names) if len(names) <= NAMED else f"{', '.join(names[: NAMED - 2])}, ... {names[-1]}"
