"""Describe one input of a corpus: where it is, its format and compression, and whether it was changed since."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megachiar.data.inputs import remote
from megachiar.data.storage.identity import file_identity, printable
from megachiar.errors import UserError, disk_error, disk_errors

Format = Literal["jsonl", "txt", "csv", "parquet", "arrow"]
Compression = Literal["", "gz", "zst", "xz", "bz2"]

STANDARD_INPUT = "-"
MOST_NAMED = 3  # inputs that a message names
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".text": "txt",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COLUMNAR: tuple[Format, ...] = ("parquet", "arrow")
"""Formats that are read column by column, and have a compression of their own."""
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".xz": "xz", ".bz2": "bz2"}
_TEXT_FORMATS: dict[str, Format] = {"jsonl": "jsonl", "json": "jsonl", "txt": "txt", "csv": "csv"}
_ENDINGS: dict[str, Compression] = {"": "", **COMPRESSIONS}
FORMATS: dict[str, tuple[Format, Compression]] = {
    **{f"{name}{ending}": (kind, what) for name, kind in _TEXT_FORMATS.items() for ending, what in _ENDINGS.items()},
    **{kind: (kind, "") for kind in COLUMNAR},
}
"""Value of ``--format`` -> format and compression."""


@dataclass(frozen=True)
class Source:
    """Describe one input: a file, standard input (``path`` and ``url`` are None), or a remote file of ``fsspec``.

    Attributes:
        path: the file; None if the input is no local file.
        format: how documents are stored in it.
        compression: how it is compressed, if it is.
        url: the URL for ``fsspec``; None if the input is no remote file.
    """

    path: Path | None
    format: Format
    compression: Compression = ""
    url: str | None = None

    @property
    def name(self) -> str:
        """Return the name of the input in messages."""
        return self.url or ("standard input" if self.path is None else printable(self.path))

    @property
    def can_be_read_again(self) -> bool:
        """Return whether the input can be read more than once, which standard input and pipes cannot."""
        if self.path is None:
            return self.url is not None
        return not self.path.is_fifo()

    @property
    def size(self) -> int | None:
        """Return the bytes on disk; None where they cannot be known before the end."""
        if self.url is not None:
            return remote.details(self.url)["size"]
        if self.path is None:
            return None
        status = self._status(self.path)
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def identity(self) -> list[Any]:
        """Return [name, bytes, times]; where they are the same in a later run, the input was not touched.

        The times, in nanoseconds, are those of the last change of the content and of the last change of any kind. The
        first is older where a file was moved or copied here with its times. A URL has its version instead of times.
        Values that are not known are None.
        """
        if self.path is None:
            return self.identity_by_content_time()
        with disk_errors(self.name, "read"):
            return file_identity(self.path)

    def identity_by_content_time(self) -> list[Any]:
        """Return [name, bytes, time of the last change of the content], which earlier versions recorded."""
        if self.url is not None:
            found = remote.details(self.url)
            return [self.name, found["size"], found["version"]]
        if self.path is None:
            return [self.name, None, None]
        status = self._status(self.path)
        return [self.name, status.st_size, status.st_mtime_ns]

    def _status(self, path: Path) -> os.stat_result:
        try:
            return os.stat(path)
        except OSError as error:
            raise disk_error(self.name, error, "read") from error


def make_source(path: Path, format: str | None) -> Source:
    """Return the source for the file at ``path``.

    Args:
        path: a file.
        format: its format, one of FORMATS; None goes by the suffix.

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


def no_document(sources: Sequence[Source], skipped: Mapping[str, int]) -> UserError:
    """Return the error for inputs of which no document can be used.

    Args:
        sources: all inputs.
        skipped: reason -> number of documents that were left out.
    """
    named = ", ".join(source.name for source in sources[:MOST_NAMED])
    more = f" and {len(sources) - MOST_NAMED:,} more" if len(sources) > MOST_NAMED else ""
    reasons = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
    problem = f"held no usable document (skipped: {reasons or 'none'})"
    remedy = "check --text-key, and that the files hold text" if skipped else "name files that are not empty"
    return UserError(f"--input {named}{more}", problem, remedy)


def format_of(name: str) -> tuple[Format, Compression] | None:
    """Return format and compression by the suffixes of a file's name, in any case; None if they are not known."""
    return _format_by_suffixes(tuple(name.lower().split(".")[1:][-2:]))


@functools.cache  # tens of thousands of files have few suffixes
def _format_by_suffixes(last_two: tuple[str, ...]) -> tuple[Format, Compression] | None:
    """Return format and compression by the last one or two suffixes, without their dots."""
    *inner, last = ["", *(f".{suffix}" for suffix in last_two)]
    compression = COMPRESSIONS.get(last, "")
    kind = SUFFIXES.get(inner[-1] if compression and inner else last)
    return None if kind is None or (kind in COLUMNAR and compression) else (kind, compression)


def split_format(format: str) -> tuple[Format, Compression]:
    """Split a format into format and compression, such as ``"jsonl.gz"`` into ``("jsonl", "gz")``.

    Raises:
        UserError: ``format`` is none of FORMATS.
    """
    if format not in FORMATS:
        raise UserError("--format", f"unknown format {format!r}", f"use one of {', '.join(FORMATS)}")
    return FORMATS[format]


def known_suffixes() -> str:
    """Return the known suffixes as a message shows them."""
    return f"{' '.join(SUFFIXES)}, and {' '.join(COMPRESSIONS)} after those of text"
