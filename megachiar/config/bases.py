"""``base: other.yaml``: a config that says only what differs from another one.

    mine.yaml        base: 400m, training: {epochs: 1}
      |  its base: a file beside mine.yaml, or else the shipped config of that name
      v
    400m.yaml        the rest, or again a base

Mappings are merged key by key; any other value, a list too, replaces the one below it. A length of the run
(``training.steps``, ``tokens`` or ``epochs``) replaces whichever of the three the base has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megachiar.config.run_length import drop_other_lengths
from megachiar.config.shipped import shipped_configs
from megachiar.config.yaml_file import read_yaml
from megachiar.errors import UserError

BASE = "base"
Places = dict[tuple[str, ...], str]
"""Key path -> ``file:line`` where its value stands."""


def read_with_bases(path: Path) -> tuple[dict[str, Any], Places]:
    """Read the config at ``path`` and merge it over its bases.

    Returns:
        the mapping without ``base``, and the place of each of its key paths.

    Raises:
        UserError: one of the files is missing, is no YAML mapping, or is its own base.
        ConfigError: a key stands twice in one mapping.
    """
    chain = files_of(path)
    mapping, places = _read(chain[-1])
    for file in reversed(chain[:-1]):
        over, its_places = _read(file)
        if isinstance(over.get("training"), dict):
            drop_other_lengths(mapping.get("training"), over["training"])
        mapping = _merge(mapping, over)
        places = {**{key: where for key, where in places.items() if not _is_replaced(key, over)}, **its_places}
    return mapping, places


def files_of(path: Path) -> list[Path]:
    """Return ``path`` and the files that it is based on, the nearest base first.

    Raises:
        UserError: as ``read_with_bases``.
    """
    chain = [path]
    while (base := _base_of(chain[-1])) is not None:
        file, place = base
        names = " -> ".join(map(str, [*chain, file]))
        if file.resolve() in [earlier.resolve() for earlier in chain]:
            raise UserError(place, f"a config cannot be its own base: {names}", "remove one of these bases")
        chain.append(file)
    return chain


def _base_of(path: Path) -> tuple[Path, str] | None:
    """Return the file that the config at ``path`` is based on, and the place that names it."""
    mapping, lines = read_yaml(path)
    if BASE not in mapping:
        return None
    name, place = mapping[BASE], f"{path}:{lines[(BASE,)]}"
    if not isinstance(name, str) or not name:
        raise UserError(place, f"base is {name!r}, not the path of a config", "write `base: other.yaml`")
    file = path.parent / name
    if file.is_file():
        return file, place
    shipped = shipped_configs()
    if (known := name.removesuffix(".yaml")) in shipped:
        return shipped[known], place
    raise UserError(
        place,
        f"base {name} is neither a file ({file}) nor a shipped config ({', '.join(shipped)})",
        "name a file by its path from the folder of this one",
    )


def _read(path: Path) -> tuple[dict[str, Any], Places]:
    mapping, lines = read_yaml(path)
    mapping.pop(BASE, None)
    return mapping, {key: f"{path}:{line}" for key, line in lines.items() if key != (BASE,)}


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
