"""``base: other.yaml``: a config that says only what differs from another one.

    mine.yaml        base: 400m, training: {epochs: 1}
      |  its base: a file beside mine.yaml, or else the shipped config of that name
      v
    400m.yaml        the rest, or again a base

Mappings are merged key by key; any other value, a list too, replaces the one below it. A length of the run
(``training.steps``, ``tokens`` or ``epochs``) replaces whichever of the three the base has.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from megachiar.config.run_length import drop_other_lengths
from megachiar.config.shipped import shipped_configs
from megachiar.config.yaml_file import nearest_config, read_yaml, shown_path
from megachiar.errors import UserError

BASE = "base"
Locations = dict[tuple[str, ...], str]
"""Key path -> ``file:line`` where its value stands."""


class _File(NamedTuple):
    """A config as one file has it.

    Attributes:
        path: the file.
        mapping: its content, without ``base``.
        locations: the location of each of its key paths.
        base: the file that it is based on; None without one.
    """

    path: Path
    mapping: dict[str, Any]
    locations: Locations
    base: Path | None


def read_with_bases(path: Path) -> tuple[dict[str, Any], Locations]:
    """Read the config at ``path`` and merge it over its bases.

    Returns:
        the mapping without ``base``, and the location of each of its key paths.

    Raises:
        UserError: one of the files is missing, is no YAML mapping, or is its own base.
        ConfigError: a key stands twice in one mapping.
    """
    *over, lowest = _read_chain(path)
    mapping, locations = lowest.mapping, lowest.locations
    for file in reversed(over):
        if isinstance(file.mapping.get("training"), dict):
            drop_other_lengths(mapping.get("training"), file.mapping["training"])
        mapping = _merge(mapping, file.mapping)
        kept = {key: where for key, where in locations.items() if not _is_replaced(key, file.mapping)}
        locations = {**kept, **file.locations}
    return mapping, locations


def files_of(path: Path) -> list[Path]:
    """Return ``path`` and the files that it is based on, the nearest base first.

    Raises:
        UserError: as ``read_with_bases``.
    """
    return [file.path for file in _read_chain(path)]


def _read_chain(path: Path) -> list[_File]:
    """Read the config at ``path`` and its bases, the nearest base first; each file is read once: it may be a pipe."""
    chain = [_read(path)]
    while (base := chain[-1].base) is not None:
        if base.resolve() in [file.path.resolve() for file in chain]:
            names = " -> ".join(str(each) for each in [*(file.path for file in chain), base])
            location = chain[-1].locations[(BASE,)]
            raise UserError(location, f"a config cannot be its own base: {names}", "remove one of these bases")
        chain.append(_read(base))
    for file in chain:
        file.locations.pop((BASE,), None)
    return chain


def _read(path: Path) -> _File:
    mapping, lines = read_yaml(path)
    locations = {key: f"{shown_path(path)}:{line}" for key, line in lines.items()}
    base = _find_base(path, mapping.pop(BASE), locations[(BASE,)]) if BASE in mapping else None
    return _File(path, mapping, locations, base)


def _find_base(path: Path, name: Any, location: str) -> Path:
    """Return the file that the config at ``path`` is based on, which it calls ``name`` at ``location``."""
    if not isinstance(name, str) or not name:
        raise UserError(location, f"base is {name!r}, not the path of a config", "write `base: other.yaml`")
    file = path.parent / Path(os.path.expandvars(name)).expanduser()
    if file.is_file():
        return file
    shipped = shipped_configs()
    if (known := name.removesuffix(".yaml")) in shipped:
        return shipped[known]
    nearest = nearest_config(file)
    meant = f"did you mean {Path(name).with_name(nearest.name)}? else " if nearest is not None else ""
    raise UserError(
        location,
        f"base {name} is neither a file ({file}) nor a shipped config ({', '.join(shipped)})",
        f"{meant}name a file by its path from the folder of this one",
    )


def _merge(below: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _is_replaced(path: tuple[str, ...], over: Any) -> bool:
    """Whether the mapping ``over`` has a value of its own for the key path, or for a key above it."""
    for name in path:
        if not isinstance(over, dict):
            return True
        if name not in over:
            return False
        over = over[name]
    return True
