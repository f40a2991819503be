"""The configs that come with megachiar: ``configs/`` of a checkout, which a wheel holds as ``megachiar/configs/``."""

from __future__ import annotations

import difflib
from pathlib import Path

import megachiar
from megachiar.errors import UserError


def shipped_folder() -> Path:
    package = Path(megachiar.__file__).resolve().parent
    installed, checkout = package / "configs", package.parent / "configs"
    return installed if installed.is_dir() else checkout


def shipped_configs() -> dict[str, Path]:
    """Name -> file."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def shipped_config(name: str) -> Path:
    """The file of the shipped config ``name`` (``tiny`` or ``tiny.yaml``).

    Raises:
        UserError: there is none of this name.
    """
    found = shipped_configs()
    name = name.removesuffix(".yaml")
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(name, "there is no such shipped config", f"{meant}there are {', '.join(found)}")
    return found[name]


def title_of(path: Path) -> str:
    """The first sentence of a config's comment: what it is."""
    comment = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()[1:]]
    return " ".join(comment).split(". ")[0].split(": ")[0].rstrip(".")
