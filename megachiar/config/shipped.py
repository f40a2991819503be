"""The configs that come with megachiar: ``configs/`` of a checkout, which a wheel holds as ``megachiar/configs/``.

configs/NAME.yaml               recommended
configs/published/NAME.yaml     the published training as it was
configs/sweeps/NAME.yaml        sweeps, each over one of the others
"""

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
    """Return the file of each shipped config by its name, such as ``400m`` and ``published/400m``."""
    folder = shipped_folder()
    paths = [*sorted(folder.glob("*.yaml")), *sorted((folder / "published").glob("*.yaml"))]
    return {_name_of(path, folder): path for path in paths}


def shipped_sweeps() -> dict[str, Path]:
    """Return the file of each shipped sweep by its name, such as ``sweeps/ablation``."""
    folder = shipped_folder()
    return {_name_of(path, folder): path for path in sorted((folder / "sweeps").glob("*.yaml"))}


def find_sweep(path: Path) -> Path:
    """Return the file of a sweep that is given by its path, or by the name of a shipped one."""
    shipped = shipped_sweeps()
    named = f"sweeps/{str(path).removeprefix('sweeps/').removesuffix('.yaml')}"
    return shipped[named] if not path.exists() and named in shipped else path


def _name_of(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def shipped_config(name: str) -> Path:
    """Return the file of the shipped config or sweep ``name``, which is given as ``tiny`` or ``tiny.yaml``.

    Raises:
        UserError: there is none of this name.
    """
    found = {**shipped_configs(), **shipped_sweeps()}
    name = name.removesuffix(".yaml")
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(name, "there is no such shipped config", f"{meant}the shipped configs are {', '.join(found)}")
    return found[name]


def title_of(path: Path) -> str:
    """Return the first sentence of a config's comment, which describes the config."""
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    comment = [line.lstrip("# ") for line in lines if "yaml-language-server" not in line]
    return " ".join(comment).split(". ")[0].split(": ")[0].rstrip(".")
