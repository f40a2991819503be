"""One input of a corpus: where it is, its format and compression, and what tells whether it is still the same."""

from __future__ import annotations

import functools
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megachiar.data.inputs import remote
from megachiar.errors import UserError, disk_error

Format = Literal["jsonl", "txt", "parquet"]
Compression = Literal["", "gz", "zst", "xz", "bz2"]

STANDARD_INPUT = "-"
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".text": "txt",
    ".parquet": "parquet",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".xz": "xz", ".bz2": "bz2"}
FORMATS = (*(f"{kind}{end}" for kind in ("jsonl", "txt") for end in ("", *COMPRESSIONS)), "parquet")


@dataclass(frozen=True)
class Source:
    """One input: a file, standard input (``path`` and ``url`` None), or what ``url`` names for ``fsspec``."""

    path: Path | None
    format: Format
    compression: Compression = ""
    url: str | None = None

    @property
    def name(self) -> str:
        return self.url or ("standard input" if self.path is None else str(self.path))

    @property
    def can_be_read_again(self) -> bool:
        return self.path is not None or self.url is not None

    @property
    def size(self) -> int | None:
        """Bytes on disk, None where they cannot be known before the end."""
        if self.url is not None:
            return remote.details(self.url)["size"]
        if self.path is None:
            return None
        found = self._status()
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def identity(self) -> list[Any]:
        """[name, bytes, time of change]: what tells whether it is still the same input."""
        if self.url is not None:
            found = remote.details(self.url)
            return [self.name, found["size"], found["version"]]
        if self.path is None:
            return [self.name, None, None]
        found = self._status()
        return [self.name, found.st_size, found.st_mtime_ns]

    def _status(self) -> os.stat_result:
        try:
            return os.stat(self.path)
        except OSError as error:
            raise disk_error(self.name, error, "read") from error


def make_source(path: Path, format: str | None) -> Source:
    """The file at ``path``, whose format is ``format`` (one of FORMATS), or told by its suffix if that is None.

    Raises:
        UserError: the suffix or the format is not known.
    """
    if format is not None:
        kind, compression = split_format(format)
        return Source(path, kind, compression or COMPRESSIONS.get(path.suffix.lower(), ""))
    known = format_of(path.name)
    if known is None:
        raise UserError(
            path, f"cannot tell the format by the suffix {path.suffix!r}", f"pass --format, or use {known_suffixes()}"
        )
    return Source(path, *known)


def format_of(name: str) -> tuple[Format, Compression] | None:
    """Format and compression that the suffixes of a file's name tell, in whatever case; None if they do not."""
    return _format_by_suffixes(tuple(name.lower().split(".")[1:][-2:]))


@functools.cache  # tens of thousands of files have few suffixes
def _format_by_suffixes(last_two: tuple[str, ...]) -> tuple[Format, Compression] | None:
    *inner, last = ["", *(f".{suffix}" for suffix in last_two)]
    compression = COMPRESSIONS.get(last, "")
    kind = SUFFIXES.get(inner[-1] if compression and inner else last)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def split_format(format: str) -> tuple[Format, Compression]:
    """("jsonl", "gz") of ``"jsonl.gz"``.

    Raises:
        UserError: it is none of FORMATS.
    """
    if format not in FORMATS:
        raise UserError("--format", f"unknown format {format!r}", f"use one of {', '.join(FORMATS)}")
    kind, _, compression = format.partition(".")
    return kind, compression  # type: ignore[return-value]


def known_suffixes() -> str:
    """The suffixes that are known, as a message shows them."""
    return f"{' '.join(SUFFIXES)}, and {' '.join(COMPRESSIONS)} after those of text"
