"""This reader takes numbers by YAML 1.2, refuses duplicate keys and knows the line of every key."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import select
import sys
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from megachiar.config.errors import ConfigError, Problem
from megachiar.config.shipped import shipped_configs
from megachiar.errors import UserError

Lines = dict[tuple[str, ...], int]
"""Key path -> line, counted from 1."""
STANDARD_INPUT = Path("-")
"""The path that stands for standard input on a command line."""
LARGEST_CONFIG = 1 << 24  # bytes
PIPE_TIMEOUT_S = 30.0
"""Seconds to wait for the next bytes of a pipe."""

MAX_NODES = 100_000
"""Values that a config may have, with its aliases written out: a few lines of aliases can stand for billions."""
MAX_DEPTH = 50
"""Levels that a config may be nested by."""


class _Loader(yaml.SafeLoader):
    """Read YAML 1.2, and only what a config can hold: mappings, lists, text, numbers, booleans and null.

    PyYAML follows YAML 1.1, where 1e-4 is a string, `no` a boolean and 2020-01-01 a date. What cannot be read is always
    a ``yaml.YAMLError``.
    """

    def get_single_node(self) -> yaml.Node | None:
        """Return the document as nodes, after checking that none is too large or nested too deep."""
        try:
            node = super().get_single_node()
        except RecursionError:
            raise ConstructorError(None, None, "it is nested too deep", None) from None
        if node is not None:
            _expanded_size(node, {})
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        """Return the document's value."""
        try:
            return super().construct_document(node)
        except (ValueError, KeyError, OverflowError) as error:  # of a number or boolean that is none
            raise ConstructorError(None, None, str(error), node.start_mark) from None


def _expanded_size(node: yaml.Node, sizes: dict[int, int], depth: int = 0) -> int:
    """Return how many nodes ``node`` is with its aliases written out.

    Args:
        node: of the document.
        sizes: the sizes known by the identity of a node; 0 for one that is being counted.
        depth: nodes around this one.

    Raises:
        ConstructorError: it is too large or nested too deep, contains itself, or has a type that no config can hold.
    """
    known = sizes.get(id(node))
    if known == 0:
        raise ConstructorError(None, None, "an alias stands inside the value that it repeats", node.start_mark)
    if known is not None:
        return known
    if node.tag not in _TAGS:
        raise ConstructorError(None, None, f"the type {node.tag!r} has no place in a config", node.start_mark)
    if depth > MAX_DEPTH:
        raise ConstructorError(None, None, f"it is nested deeper than {MAX_DEPTH} levels", node.start_mark)
    sizes[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_expanded_size(child, sizes, depth + 1) for child in children)
    if size > MAX_NODES:
        message = f"with its aliases written out it has more than {MAX_NODES:,} values"
        raise ConstructorError(None, None, message, node.start_mark)
    sizes[id(node)] = size
    return size


_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}

_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":float", ":bool", ":timestamp", ":int", ":value"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """Return the value of a ``--set key=value``, read as YAML."""
    return yaml.load(text, Loader=_Loader)


def read_source_list(path: Path) -> list[Any]:
    """Return the sources that the file at ``path`` lists, as ``data.train`` would.

    Raises:
        UserError: the file is missing, or holds no text, no YAML or no list.
    """
    try:
        sources = yaml.load(_read_bytes(path).decode(), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(path, "no such list of sources", "check data.train, or list the sources there") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(path, f"cannot be read as YAML: {error}", "mend the file that data.train names") from None
    if not isinstance(sources, list):
        raise UserError(
            path,
            f"holds {type(sources).__name__}, not a list of sources",
            "write lines - {path: data/a, weight: 2}",
        )
    return sources


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """Read the mapping in the file at ``path``.

    Returns:
        the mapping, and the line of each key path, counted from 1.

    Raises:
        UserError: the file is missing, or holds no text, no YAML or no mapping.
        ConfigError: a key stands twice in one mapping.
    """
    shown = shown_path(path)
    try:
        text = _read_bytes(path).decode()
    except FileNotFoundError:
        raise UserError(
            path, "no such config file", f"{_meant(path)}check the path; `megachiar config list` names shipped ones"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(shown, f"cannot be read as text: {error}", "pass a YAML file in UTF-8") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        lines, twice = _locate(node)
        if twice:
            raise ConfigError(
                shown,
                [
                    (
                        f"{shown}:{line}",
                        Problem(".".join(key), f"stands twice (first on line {lines[key]})", "keep one"),
                    )
                    for key, line in twice
                ],
            )
        mapping = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{shown}:{mark.line + 1}:{mark.column + 1}" if mark else shown
        detail = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(location, f"not valid YAML: {detail}", "mend the syntax at this place") from None
    if not isinstance(mapping, dict):
        raise UserError(
            shown,
            f"holds {type(mapping).__name__}, not a mapping of sections",
            "see `megachiar config show tiny`",
        )
    return mapping, lines


def shown_path(path: Path) -> str:
    """Return the name of a config in messages."""
    return "standard input" if path == STANDARD_INPUT else str(path)


def _read_bytes(path: Path) -> bytes:
    """Return the bytes of a config: of a file, of standard input, or of a pipe such as a shell's ``<(command)``.

    Raises:
        TimeoutError: a pipe has a writer that wrote nothing for ``PIPE_TIMEOUT_S``.
        OSError: the file cannot be read, or has more than ``LARGEST_CONFIG`` bytes, as a device without end has.
    """
    if path == STANDARD_INPUT:
        content = sys.stdin.buffer.read(LARGEST_CONFIG + 1)
    elif path.is_fifo():
        content = _read_pipe(path)
    else:
        with open(path, "rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
    if len(content) > LARGEST_CONFIG:
        raise OSError(f"it has more than {LARGEST_CONFIG:,} bytes")
    return content


def _read_pipe(path: Path) -> bytes:
    """Return the bytes of a pipe, hardly more than ``LARGEST_CONFIG`` of them."""
    parts: list[bytes] = []
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else a pipe without a writer would wait for ever
    with open(descriptor, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], PIPE_TIMEOUT_S)[0]:
                raise TimeoutError(f"nothing was written to this pipe for {PIPE_TIMEOUT_S:.0f} s")
            part = pipe.read(2**20)
            parts.append(part)
            if not part or sum(map(len, parts)) > LARGEST_CONFIG:
                return b"".join(parts)


def _meant(path: Path) -> str:
    """Return a question where a file beside ``path`` or a shipped config may be meant, and else nothing."""
    if (nearest := nearest_config(path)) is not None:
        return f"did you mean {nearest}? else "
    near = difflib.get_close_matches(path.stem, shipped_configs(), n=1, cutoff=0.75)
    return f"`megachiar config init {near[0]}` writes the shipped config to {near[0]}.yaml; else " if near else ""


def nearest_config(path: Path) -> Path | None:
    """Return the YAML file in the folder of ``path`` whose name is nearest to that of ``path``; None without one.

    The extension counts little: ``mine.yml`` and ``mine`` mean ``mine.yaml``.
    """
    names = []
    with contextlib.suppress(OSError, ValueError):
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    stems = {Path(name).stem.lower(): name for name in names}
    near = difflib.get_close_matches(path.stem.lower(), stems, n=1, cutoff=0.6)
    return path.with_name(stems[near[0]]) if near else None


def _locate(node: yaml.Node | None) -> tuple[Lines, list[tuple[tuple[str, ...], int]]]:
    """Find the lines of keys.

    Returns:
        the line of each key path below ``node``, and the keys that repeat an earlier one of the same mapping.
    """
    lines: Lines = {}
    twice: list[tuple[tuple[str, ...], int]] = []

    def walk(node: yaml.Node, prefix: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                path, line = (*prefix, str(key.value)), key.start_mark.line + 1
                if path in lines:
                    twice.append((path, line))
                    continue
                lines[path] = line
                walk(value, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                path = (*prefix, str(index))
                lines[path] = value.start_mark.line + 1
                walk(value, path)

    if node is not None:
        walk(node, ())
    return lines, twice
