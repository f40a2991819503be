"""Copies of the shipped configs, in a folder where they can be changed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megachiar.config.bases import files_of
from megachiar.config.shipped import shipped_config, shipped_folder
from megachiar.errors import UserError, disk_errors


class ConfigCopy(NamedTuple):
    """A copied config.

    Attributes:
        path: the copy.
        bases: the files beside it that it is based on, the nearest first.
        kept: files that were there already and were left as they are: the copy, if it is the same, and bases.
    """

    path: Path
    bases: list[Path]
    kept: list[Path]


def copy_shipped_config(name: str, folder: Path, overwrite: bool = False) -> ConfigCopy:
    """Copy the shipped config ``name`` and its bases to ``folder``, below it where its name has a folder.

    Args:
        name: of the config, such as ``tiny`` or ``published/400m``.
        folder: that exists.
        overwrite: replace files that are there already; without it a base that is there is kept.

    Raises:
        UserError: there is no config of this name, another file of its name is there, or one cannot be written.
    """
    shipped = shipped_config(name)
    first, *bases = [shipped] if name.startswith("sweeps/") else files_of(shipped)
    copies = {file: folder / file.relative_to(shipped_folder()) for file in (first, *bases)}
    path = copies[first]
    if path.exists() and not overwrite and not _same_text(first, path):
        raise UserError(path, "exists already and is another config", "move it, or replace it with --overwrite")
    kept = [copy for copy in copies.values() if copy.exists() and not overwrite]
    for file, copy in copies.items():
        if copy not in kept:
            with disk_errors(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    return ConfigCopy(path, [copies[base] for base in bases], kept)


def _same_text(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()
