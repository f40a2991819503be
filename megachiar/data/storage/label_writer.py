"""Write the labels of a dataset while its documents are written, and go on after a kill; see ``labels`` for the file.

The classes of a corpus may be known only at its end, so that numbers are written as classes are found. The complete
file has their final numbers. Until then the numbers stand in a temporary file of their own, which a kill leaves as
it is.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megachiar.data.storage.files import (
    block_checksums,
    found_labels_path,
    labels_path,
    temporary_path,
)
from megachiar.data.storage.labels import LABEL_DTYPE, labels_header
from megachiar.data.storage.writer import START_AFRESH, WRITE_BUFFER, open_locked
from megachiar.errors import UserError, disk_errors


class LabelsState(NamedTuple):
    """Record how far the labels of a dataset have come.

    Attributes:
        documents: how many have a label.
        checksum: the CRC-32 of the numbers as they were found.
        completed: the checksums of the blocks of the complete file; empty before it is complete.
    """

    documents: int = 0
    checksum: int = 0
    completed: list[str] | None = None


class LabelsBuilder:
    """Write the labels of dataset ``prefix`` in bounded memory, whole or not at all.

    Attributes:
        prefix: the path of the dataset without ``.bin``.
        documents: how many labels were added.
        checksums: the digests of the complete file's blocks; empty until it is complete.

    Args:
        prefix: the path of the dataset without ``.bin``; its folder is there.
        state: how far an earlier builder had come, whose temporary file is continued.

    Raises:
        UserError: the disk is full or read-only, another process writes the same labels, or the temporary file does not
            fit ``state``.
    """

    def __init__(self, prefix: Path | str, state: LabelsState | None = None):
        self.prefix = Path(prefix)
        self.checksums: list[str] = []
        state = state or LabelsState()
        self.documents, self._checksum = state.documents, state.checksum
        self._path = found_labels_path(prefix)
        with disk_errors(self._path):
            self._file = open_locked(self._path)
            size, found = LABEL_DTYPE.itemsize * state.documents, os.fstat(self._file.fileno()).st_size
            if found < size:
                self.close()
                problem = f"has {found:,} bytes, but the journal beside it tells of {size:,}"
                raise UserError(self._path, problem, START_AFRESH)
            self._file.truncate(size)
            self._file.seek(size)

    def add(self, numbers: NDArray[Any]) -> None:
        """Add the class numbers of the next documents, whole numbers (documents,)."""
        content = numbers.astype(LABEL_DTYPE).tobytes()
        with disk_errors(self._path):
            self._file.write(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self.documents += numbers.size

    def state(self) -> LabelsState:
        """Return how far the labels have come; all that was added until now survives a kill or a power cut."""
        self._sync()
        return LabelsState(self.documents, self._checksum, self.checksums)

    def complete(self, renumbering: NDArray[Any] | None = None) -> None:
        """Write the complete file under its temporary name, so that ``put_in_place`` can rename it.

        Args:
            renumbering: the final number of each class, by the number that it was found with; None keeps the numbers.

        Raises:
            UserError: the disk is full, or what was written before was altered.
        """
        self._sync()
        checksum = 0
        for content in self._blocks():
            checksum = zlib.crc32(content, checksum)
        if checksum != self._checksum:
            problem = "was altered since an earlier run wrote it: it does not fit the journal beside it"
            raise UserError(self._path, problem, START_AFRESH)
        output = temporary_path(labels_path(self.prefix))
        with disk_errors(output):
            output.unlink(missing_ok=True)  # it may be a link to another file
            with open(output, "wb") as file:
                file.write(labels_header(self.documents))
                for content in self._blocks():
                    numbers = np.frombuffer(content, LABEL_DTYPE)
                    file.write(content if renumbering is None else renumbering[numbers].astype(LABEL_DTYPE).tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.checksums = block_checksums(output)

    def close(self) -> None:
        """Close the temporary file, which stays where it is, to be continued or removed."""
        with contextlib.suppress(OSError):  # closing writes buffered bytes, and a full disk refuses that too
            self._file.close()

    def abort(self) -> None:
        """Close the temporary file, which ``IndexedDatasetBuilder.abort`` removes with the others."""
        self.close()

    def _blocks(self) -> Iterator[bytes]:
        """Yield all numbers that were added, as bytes."""
        with disk_errors(self._path, "read"):
            self._file.seek(0)
            while content := self._file.read(WRITE_BUFFER):
                yield content

    def _sync(self) -> None:
        with disk_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
