"""Names of a dataset's three files, and how a file is put in its place so that it is whole or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from megachiar.errors import disk_errors

READ_BLOCK = 1 << 22  # bytes


def bin_path(prefix: Path | str) -> Path:
    """The tokens of dataset ``prefix``. A prefix may hold dots: nothing of it is taken for a suffix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """The index of dataset ``prefix``."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: Path | str) -> Path:
    """The manifest of dataset ``prefix``."""
    return Path(f"{prefix}.json")


def dataset_files(prefix: Path | str) -> tuple[Path, Path, Path]:
    """All files of dataset ``prefix``, the index first: without it nothing is a dataset."""
    return idx_path(prefix), manifest_path(prefix), bin_path(prefix)


def temporary_path(path: Path) -> Path:
    """Where ``path`` is written before it is whole: the same folder, so that the rename is atomic.

    The name is fixed, so that what a killed run left behind is replaced by the next one and never piles up.
    """
    return path.with_name(path.name + ".tmp")


def sync_folder(folder: Path) -> None:
    """Make the renames inside ``folder`` survive a power cut, on file systems that can promise it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``: afterwards the file is the old one or the new one, never a part of it.

    Raises:
        UserError: the disk is full, read-only or forbidden; nothing new is left there.
    """
    temporary = temporary_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def checksum(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """``"sha256:..."`` of the file's content, the same digits that ``sha256sum`` prints; reads in bounded memory.

    Args:
        path: the file to read.
        on_bytes: called with the number of bytes of each block read, for a progress display.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return f"sha256:{digest.hexdigest()}"
