"""Write a corpus as JSON lines, a file for each of training, validation and test: all of them whole, or none new."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megachiar.data.storage.files import sync_folder, temporary_path
from megachiar.errors import UserError, disk_errors

PARTS = ("train", "valid", "test")


def part_paths(folder: Path) -> dict[str, Path]:
    """Return the file of each part of a corpus."""
    return {part: folder / f"{part}.jsonl" for part in PARTS}


def write_parts(records: Iterable[tuple[str, Mapping[str, Any]]], folder: Path, *, overwrite: bool = False) -> None:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` into ``folder``: all of them whole, or none new.

    A file that has the same content already stays as it is, so that nothing that was made of it counts as outdated.

    Args:
        records: the part and the values of each line.
        folder: where the files go.
        overwrite: replace files that hold something else.

    Raises:
        UserError: a file holds something else, the disk is full or read-only, or permission is denied.
    """
    paths = part_paths(folder)
    temporary = {part: temporary_path(path) for part, path in paths.items()}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as stack:
                files = {part: stack.enter_context(open(path, "wb")) for part, path in temporary.items()}
                for part, record in records:
                    files[part].write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
            changed = [part for part in PARTS if not _same_content(temporary[part], paths[part])]
            if not overwrite and (other := [paths[part] for part in changed if paths[part].exists()]):
                remedy = "choose another --output, or pass --overwrite"
                raise UserError(other[0], "exists already and holds another text than this corpus", remedy)
            for part in PARTS:
                if part in changed:
                    os.replace(temporary[part], paths[part])
                else:
                    temporary[part].unlink()
        except BaseException:
            for path in temporary.values():
                path.unlink(missing_ok=True)
            raise
        sync_folder(folder)


def _same_content(new: Path, old: Path) -> bool:
    """Return whether ``old`` exists and has the content of ``new``."""
    return old.is_file() and filecmp.cmp(new, old, shallow=False)
