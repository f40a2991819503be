"""Name a dataset's files, compute their checksums, and move them into place whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from megachiar.errors import UserError, disk_errors

READ_BLOCK = 1 << 22  # bytes read at once
CHECKSUM_BLOCK: Final = 67_108_864  # bytes that one checksum covers
CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)  # what such file systems answer


def bin_path(prefix: Path | str) -> Path:
    """Return the file of the tokens of dataset ``prefix``, which may hold dots: no part of it is taken for a suffix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """Return the file of the index of dataset ``prefix``."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: Path | str) -> Path:
    """Return the file of the manifest of dataset ``prefix``."""
    return Path(f"{prefix}.json")


def labels_path(prefix: Path | str) -> Path:
    """Return the file of the labels of dataset ``prefix``, which only a labelled dataset has."""
    return Path(f"{prefix}.labels.npy")


def dataset_files(prefix: Path | str) -> tuple[Path, Path, Path]:
    """Return the files that every dataset ``prefix`` has, the index first: without it nothing is a dataset."""
    return idx_path(prefix), manifest_path(prefix), bin_path(prefix)


def possible_files(prefix: Path | str) -> tuple[Path, ...]:
    """Return the files that dataset ``prefix`` may have, those of ``dataset_files`` first."""
    return (*dataset_files(prefix), labels_path(prefix))


def check_prefix(prefix: Path | str) -> None:
    """Refuse a path that ends without a file name, to which suffixes could be added.

    Raises:
        UserError: ``prefix`` is a folder by its form, such as ``.``, ``..`` or ``/``.
    """
    if Path(prefix).name in ("", ".."):
        raise UserError(f"output {str(prefix)!r}", "names a folder, not a dataset", "add a name, such as data/train")


def remove_dataset(prefix: Path | str) -> None:
    """Remove the files of dataset ``prefix`` that exist, the index first."""
    for path in possible_files(prefix):
        path.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return where ``path`` is written before it is whole: in the same folder, so that the rename is atomic.

    The name is fixed, so that the next run replaces the files of a killed run.
    """
    return path.with_name(path.name + ".tmp")


def starts_path(prefix: Path | str) -> Path:
    """Return the file that keeps the document starts while dataset ``prefix`` is written."""
    return temporary_path(Path(f"{prefix}.starts"))


def found_labels_path(prefix: Path | str) -> Path:
    """Return the file that keeps the labels as they are found while dataset ``prefix`` is written."""
    return temporary_path(Path(f"{prefix}.labels"))


def put_in_place(prefix: Path | str) -> None:
    """Give a dataset's complete temporary files their final names; a call after a kill does the rest.

    Files that exist under these names are removed first, index and manifest before tokens, so that files of two
    datasets are never joined. The new index, without which nothing opens, comes last.
    """
    idx, manifest, bin_ = dataset_files(prefix)
    labels = labels_path(prefix)
    if temporary_path(bin_).exists():
        for path in (idx, manifest, labels):
            path.unlink(missing_ok=True)
    for path in (bin_, labels, manifest, idx):
        if temporary_path(path).exists():
            os.replace(temporary_path(path), path)
            sync_folder(path.parent)
    starts_path(prefix).unlink(missing_ok=True)
    found_labels_path(prefix).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renames inside ``folder`` survive a power cut, on file systems that can promise it.

    Raises:
        UserError: the disk fails.
    """
    with disk_errors(folder):
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except PermissionError:  # a folder that may be written, but not listed
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in CANNOT_SYNC_FOLDERS:
                raise
        finally:
            os.close(descriptor)


def check_writable(path: Path, where: str | None = None) -> None:
    """Refuse a file that cannot be written, before the work whose result it shall hold.

    Args:
        path: of the file.
        where: what an error names in its place, such as an option with its value.

    Raises:
        UserError: its folder is missing or may not be written to, or it is a folder itself.
    """
    place = path if where is None else where
    if path.is_dir():
        raise UserError(place, "is a folder", "name a file in it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        problem = "cannot be written to" if path.parent.is_dir() else "is no folder"
        raise UserError(place, f"cannot be written: {path.parent} {problem}", "make that folder, or name another")


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that the file is always the old one or the new one, never a part of it.

    Raises:
        UserError: the disk is full or read-only, or permission is denied; nothing new is left there.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_temporary(path, content)
            os.replace(temporary_path(path), path)
        except BaseException:
            temporary_path(path).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_temporary(path: Path, content: bytes) -> None:
    """Write ``content`` to the temporary path of ``path``, and make it survive a power cut.

    Raises:
        UserError: the disk is full or read-only, or permission is denied.
    """
    temporary = temporary_path(path)
    with disk_errors(temporary):
        temporary.unlink(missing_ok=True)  # it may be a link to another file, or a fifo, which would wait
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


class BlockChecksums:
    """Compute the SHA-256 of each ``CHECKSUM_BLOCK`` bytes of a stream; the last block may be shorter.

    Blocks show where a file is damaged and can be verified in parallel. A writer that was stopped can go on without
    reading its earlier blocks again.

    Attributes:
        whole: hexadecimal digests of the blocks that are full.

    Args:
        whole: the digests of the full blocks that were written before, when a stream is continued.
    """

    def __init__(self, whole: Iterable[str] = ()):
        self.whole = list(whole)
        self._digest, self._room = hashlib.sha256(), CHECKSUM_BLOCK

    def update(self, data: memoryview | bytes | NDArray[Any]) -> None:
        """Add ``data`` to the end of the stream."""
        rest = as_bytes(data) if isinstance(data, np.ndarray) else memoryview(data).cast("B")
        while len(rest) >= self._room:
            self._digest.update(rest[: self._room])
            rest = rest[self._room :]
            self.whole.append(self._digest.hexdigest())
            self._digest, self._room = hashlib.sha256(), CHECKSUM_BLOCK
        self._digest.update(rest)
        self._room -= len(rest)

    def unfinished(self) -> str:
        """Return the digest of the bytes after the full blocks, whether there are any or not."""
        return self._digest.hexdigest()

    def digests(self) -> list[str]:
        """Return the digests of all blocks, the unfinished one included."""
        return [*self.whole, self._digest.hexdigest()] if self._room < CHECKSUM_BLOCK else list(self.whole)


def as_bytes(array: NDArray[Any]) -> memoryview:
    """Return the memory of a contiguous array, without copying it."""
    return array.view(np.uint8).data


def block_checksums(path: Path, on_bytes: Callable[[int], None] | None = None, threads: int = 1) -> list[str]:
    """Return the digests of the blocks of a file, see ``BlockChecksums``; the file is read in bounded memory.

    Args:
        path: the file to read.
        on_bytes: called with the number of bytes of each read, for a progress display.
        threads: how many blocks are read and hashed in parallel.
    """
    blocks = range(0, path.stat().st_size, CHECKSUM_BLOCK)
    if threads == 1:
        return [block_checksum(path, first, on_bytes) for first in blocks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda first: block_checksum(path, first, on_bytes), blocks))


def block_checksum(path: Path, first: int, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the digest of the block of a file that begins at byte ``first``, see ``BlockChecksums``.

    Raises:
        UserError: the file cannot be read.
    """
    digest, position = hashlib.sha256(), first
    with disk_errors(path, "read"), open(path, "rb", buffering=0) as file:
        read_ahead(file, first, CHECKSUM_BLOCK)
        file.seek(first)
        while position < first + CHECKSUM_BLOCK and (
            data := file.read(min(READ_BLOCK, first + CHECKSUM_BLOCK - position))
        ):
            digest.update(data)
            position += len(data)
            if on_bytes is not None:
                on_bytes(len(data))
    return digest.hexdigest()


def read_ahead(file: BinaryIO, first: int = 0, length: int = 0) -> None:
    """Advise the kernel, where it takes advice, that these bytes (length 0: to the end) will be read in order."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_SEQUENTIAL)
