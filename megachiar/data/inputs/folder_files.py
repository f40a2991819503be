"""Decide which files of a folder are read, which are left out, and which are refused.

A folder gives every file in it, at any depth and through links, whose suffix is that of a known format. A ``.json``
file may be data or settings. It is read if it is an array or has an object a line, and the first object has a string
under the key of the text. Of a folder that the library ``datasets`` wrote, the files of its table are read. Files that
our own commands wrote are left out. Files that look like text data but cannot be read are refused: such JSON under any
other suffix, other formats of data, text without a suffix. All other files are reported as left out, text with an
unknown suffix among them: it is a program or a note more often than a part of a corpus.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megachiar.data.inputs.dataset_folder import leave_out_descriptions
from megachiar.data.inputs.folder_walk import LeftOut, walk
from megachiar.data.inputs.keys import find_value
from megachiar.data.inputs.own_files import find_own_files, leave_out_runs
from megachiar.data.inputs.recognition import HEAD_BYTES, describe, json_layout, looks_like_text, refuse_what_is_no_text
from megachiar.data.inputs.source import COMPRESSIONS, SUFFIXES, Source, format_of, known_suffixes, make_source
from megachiar.data.inputs.text_reader import first_bytes
from megachiar.errors import UserError

DATA_SUFFIXES = {
    *(".tsv", ".avro", ".orc", ".tfrecord", ".mds", ".warc", ".wet", ".wat"),
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"),
    *(".lz4", ".lzma", ".lzo", ".sz", ".snappy", ".br", ".zstd"),
}
"""Suffixes of files that hold data in a format that is not read."""
SIDECAR_SUFFIXES = {
    *(".md5", ".sha1", ".sha256", ".sha512", ".crc", ".asc", ".sig", ".lock", ".log", ".idx", ".index", ".metadata"),
    ".done",
}
"""Suffixes of files that stand beside a data file, such as a checksum."""
NOT_DATA = ("a web page", "a PDF", "an SQLite database")
"""Kinds of files with an unknown suffix that are no data."""
NOT_DATA_NAMES = re.compile(
    r"(readme|licen[cs]e|copying|copyright|notice|authors|contributors|contributing|changelog|changes|news|todo|version|"
    r"manifest|makefile|dockerfile|_success|_started|_committed.*|(sha|md)\d+sums?|checksums?)$"
)
"""Names of text files without a suffix, in lower case, that are not data."""
JSON_HEAD_BYTES = 1 << 16  # read of a .json file to tell data from settings
MOST_NAMED = 5  # files that a message names


@dataclass
class FoundFiles:
    """Hold the files that a folder or a glob gave.

    Attributes:
        pattern: the folder or glob as it was named.
        sources: the files that are read, in order.
        left_out: the other files and folders, by their paths in the folder.
    """

    pattern: str
    sources: list[Source] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def summary(self) -> str:
        """Say in one line which files are read."""
        names = [source.name.removeprefix(f"{self.pattern}/") for source in self.sources]
        kinds = Counter(".".join(filter(None, (source.format, source.compression))) for source in self.sources)
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        return f"{self.pattern}: {_files(len(names))} read ({counts}): {_some(names)}"

    def lines(self) -> Iterator[str]:
        """Say line by line which files are read, and which are not and why."""
        yield self.summary()
        reasons: dict[str, list[str]] = {}
        for file in self.left_out:
            reasons.setdefault(file.reason, []).append(file.name)
        for reason, left_out in sorted(reasons.items()):
            yield f"{self.pattern}: {len(left_out):,} left out, {reason}: {_some(left_out)}"


class _Unreadable(NamedTuple):
    """Name a file of a folder that looks like text data but cannot be read, with the reason and the remedy."""

    name: str
    problem: str
    remedy: str


def folder_files(folder: Path, format: str | None, text_keys: Sequence[str]) -> FoundFiles:
    """Find the files of ``folder`` that are read, and those that are left out.

    Args:
        folder: the folder.
        format: the format of all files, one of FORMATS; None goes by their suffixes.
        text_keys: the keys of the text; a ``.json`` file is data only if it has one of them.

    Raises:
        UserError: the folder holds text data that cannot be read, or no file that is read.
    """
    names, left_out = walk(str(folder))
    names, runs = leave_out_runs(folder, names)
    names, described = leave_out_descriptions(folder, names)
    left_out += [*runs, *described]
    found = FoundFiles(str(folder), [], left_out)
    unreadable: list[_Unreadable] = []
    known_files = find_own_files(folder, names)
    for name in names:
        if name in known_files:
            left_out.append(LeftOut(name, known_files[name]))
            continue
        file = make_source(folder / name, format) if format else _classify(folder, name, text_keys)
        if isinstance(file, Source):
            found.sources.append(file)
        elif isinstance(file, LeftOut):
            left_out.append(file)
        else:
            unreadable.append(file)
    unreadable += [
        _Unreadable(link.name, link.reason, "mend the link")
        for link in left_out
        if link.reason.startswith("a broken link") and (format or format_of(link.name))
    ]
    if unreadable:
        raise _refusal(folder, unreadable)
    if not found.sources:
        reasons = "; ".join(line.partition(": ")[2] for line in list(found.lines())[1:])
        problem = "holds no file of a known format" + (f": {reasons}" if reasons else "")
        raise UserError(folder, problem, f"known suffixes: {known_suffixes()}; or name files by a glob with --format")
    return found


def _refusal(folder: Path, files: list[_Unreadable]) -> UserError:
    """Return the error that names the files that cannot be read."""
    named = ", ".join(f"{file.name} ({file.problem})" for file in files[:MOST_NAMED])
    more = f" and {len(files) - MOST_NAMED:,} more" if len(files) > MOST_NAMED else ""
    remedies = "; ".join(dict.fromkeys(file.remedy for file in files[:MOST_NAMED]))
    return UserError(
        folder,
        f"holds {_files(len(files))} of text data that cannot be read: {named}{more}",
        f"{remedies}; or leave {'it' if len(files) == 1 else 'them'} out by a quoted glob that names the files to "
        f"read, such as '{folder}/**/*.jsonl'",
    )


def _classify(folder: Path, name: str, text_keys: Sequence[str]) -> Source | LeftOut | _Unreadable:
    """Decide whether a file of a folder is read, left out or refused."""
    known, path = format_of(name.rpartition("/")[2]), Path(f"{folder}/{name}")
    if known is not None:
        source = Source(path, *known)
        is_json = known[0] == "jsonl" and name.lower().removesuffix(f".{known[1]}").endswith(".json")
        return _classify_json(source, name, text_keys) if is_json else source
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    by_format = "pass --format, which reads every file of the folder alike, or give it a suffix that is known"
    if last in SIDECAR_SUFFIXES:
        in_records = _has_text(_head(path), text_keys)
        return _Unreadable(name, f"JSON, suffix {last}", by_format) if in_records else LeftOut(name, f"suffix {last}")
    if DATA_SUFFIXES & set(suffixes[-2:]):
        return _Unreadable(name, f"{''.join(suffixes[-2:])} is not read", "make jsonl, csv or parquet of it")
    if last in COMPRESSIONS:
        return _Unreadable(name, f"its name does not tell what {last} holds", by_format)
    if any(suffix in SUFFIXES for suffix in suffixes[:-1]):
        return _Unreadable(name, f"{last} after a suffix of text", by_format)
    what = _data_in(path, last, text_keys)
    if what is not None:
        return _Unreadable(name, f"{what}, suffix {last or 'missing'}", by_format)
    return LeftOut(name, f"suffix {last}" if last else "no suffix")


def _data_in(path: Path, suffix: str, text_keys: Sequence[str]) -> str | None:
    """Return the kind of data that a file with an unknown suffix seems to hold; None for an image or a program."""
    head = _head(path)
    what, has_suffix = describe(head), bool(suffix) and not suffix[1:].isdecimal()
    if what is not None:
        return None if has_suffix and what in NOT_DATA else what
    if _has_text(head, text_keys) and json_layout(head) != "other":
        return "JSON"
    is_note = has_suffix or NOT_DATA_NAMES.match(path.name.lower()) is not None
    return None if is_note or not head.strip() or not looks_like_text(head) else "text"


def _head(path: Path) -> bytes:
    """Return the first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def _classify_json(source: Source, name: str, text_keys: Sequence[str]) -> Source | LeftOut | _Unreadable:
    """Decide whether a ``.json`` file is read as data, is left out as settings, or is refused."""
    try:
        head = first_bytes(source, JSON_HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
        if not _has_text(head, text_keys) and describe(head) is None:
            return LeftOut(name, f".json without {' or '.join(map(repr, text_keys))} in it")
        refuse_what_is_no_text(source, head)
    except UserError as error:
        return _Unreadable(name, error.problem, error.remedy)
    is_data = json_layout(head) in ("lines", "array")
    return source if is_data else LeftOut(name, ".json that is neither an array nor an object a line")


def _has_text(head: bytes, keys: Sequence[str]) -> bool:
    """Return whether the first record of JSON that begins with ``head`` has a string under one of ``keys``."""
    line = head.lstrip().partition(b"\n")[0]
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # it goes on beyond this line
        innermost = [json.dumps(key.rpartition(".")[2], ensure_ascii=False) for key in keys]
        names = b"|".join(re.escape(name.encode(errors="surrogateescape")) for name in innermost)
        return re.search(b"(" + names + rb')\s*:\s*"', head) is not None
    if isinstance(record, list):
        record = record[0] if record else None
    return isinstance(record, dict) and any(isinstance(find_value(record, key), str) for key in keys)


def _files(count: int) -> str:
    """Return text such as ``1 file`` or ``2 files``."""
    return f"{count:,} file{'s' * (count != 1)}"


def _some(names: list[str]) -> str:
    """Return the first few of ``names``, and the last one, as text."""
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{', '.join(names[: MOST_NAMED - 2])}, ... {names[-1]}"
