"""The configs that come with megachiar: ``configs/`` of a checkout, which a wheel holds as ``megachiar/configs/``."""

from __future__ import annotations

import difflib
from pathlib import Path

import megachiar
from megachiar.errors import UserError


def shipped_folder() -> Path:
    """Return the folder of the shipped configs: that of the installed package, or that of the checkout."""
    package = Path(megachiar.__file__).resolve().parent
    installed, checkout = package / "configs", package.parent / "configs"
    return installed if installed.is_dir() else checkout


def shipped_configs() -> dict[str, Path]:
    """Return the file of each shipped config by its name."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def shipped_sweeps() -> dict[str, Path]:
    """Return the file of each shipped sweep by its name."""
    return {path.stem: path for path in sorted((shipped_folder() / "sweeps").glob("*.yaml"))}


def shipped_config(name: str) -> Path:
    """Return the file of the shipped config ``name``, which is given as ``tiny`` or ``tiny.yaml``.

    Raises:
        UserError: there is no shipped config of this name.
    """
    found = shipped_configs()
    name = name.removesuffix(".yaml")
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(name, "there is no such shipped config", f"{meant}the shipped configs are {', '.join(found)}")
    return found[name]


def title_of(path: Path) -> str:
    """Return the first sentence of a config's comment, which describes the config."""
    comment = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()[1:]]
    return " ".join(comment).split(". ")[0].split(": ")[0].rstrip(".")
