"""``--set a.b=value``: one key of a config gets another value than its file says.

All overrides together are one layer over the file, as a file is one over its base. A length of the run in them replaces
the file's, and two lengths in them contradict each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from megachiar.config.bases import BASE
from megachiar.config.errors import Problem
from megachiar.config.run_length import LENGTHS, drop_other_lengths
from megachiar.config.yaml_file import parse_value
from megachiar.errors import UserError

Overridden = dict[tuple[str, ...], str]
"""Key path -> the override that set it."""


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> tuple[Overridden, list[Problem]]:
    """Set the keys of ``overrides`` in ``mapping``, a later one over an earlier one.

    Returns:
        the override that set each key path, and the problems of all of them together.

    Raises:
        UserError: as ``apply_override``.
    """
    overridden: Overridden = {}
    lengths: dict[str, Any] = {}
    for override in overrides:
        key, value = apply_override(mapping, override)
        overridden[tuple(key.split("."))] = override
        section, _, name = key.partition(".")
        if key == "training":
            lengths = {name: value[name] for name in LENGTHS if name in value} if isinstance(value, dict) else {}
        elif section == "training" and name in LENGTHS:
            lengths[name] = value
    drop_other_lengths(mapping.get("training"), lengths)
    given = {name: value for name, value in lengths.items() if value is not None}
    if len(given) <= 1:
        return overridden, []
    (first, value), *others = given.items()
    beside = " and ".join(f"training.{name} {value}" for name, value in others)
    message = f"is {value} beside {beside}: each of them says how long the run is"
    return overridden, [Problem(f"training.{first}", message, "keep one of them")]


def apply_override(mapping: dict[str, Any], override: str) -> tuple[str, Any]:
    """Set one dotted key in ``mapping``; items of a list are addressed by index (``data.train.0.path=...``).

    Returns:
        the dotted key and its value.

    Raises:
        UserError: the override is no ``key=value``, or its key does not lead through keys and indices.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}", "is not KEY=VALUE", "write for example --set training.steps=100")
    if key == BASE:
        raise UserError(f"--set {override}", "a base can only be named in a file", "write a file with this base")
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}", f"value {text!r} is not valid YAML", "quote the value") from None
    set_key(mapping, key, value, f"--set {override}")
    return key, value


def set_key(mapping: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set one dotted key in ``mapping``; items of a list are addressed by index.

    Args:
        mapping: of a config.
        key: such as ``data.train.0.path``.
        value: of the key from now on.
        where: what sets it, for messages.

    Raises:
        UserError: the key does not lead through keys and indices.
    """
    *parents, last = key.split(".")
    node: Any = mapping
    for depth, name in enumerate(parents):
        node = _child(node, name, where, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_list_index(node, last, where, ".".join(parents))] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(where, f"{'.'.join(parents)} holds a value, not keys", "set that key itself")


def _child(node: Any, name: str, where: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, name, where, key)]
    if isinstance(node, dict):
        if node.get(name) is None:
            node[name] = {}
        return node[name]
    raise UserError(where, f"{key} is below a value, not below keys", "check the key's path")


def _list_index(node: list[Any], name: str, where: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise UserError(where, f"{key} is a list of {len(node)}, {name!r} is no index in it", "use 0, 1, ...")
    return int(name)
