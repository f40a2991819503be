"""This reader takes numbers by YAML 1.2, refuses duplicate keys and knows the line of every key."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from megachiar.config.errors import ConfigError, Problem
from megachiar.config.shipped import shipped_configs
from megachiar.errors import UserError

Lines = dict[tuple[str, ...], int]
"""Key path -> line, counted from 1."""


class _Loader(yaml.SafeLoader):
    """Read YAML 1.2. PyYAML follows YAML 1.1, where 1e-4 is a string, `no` a boolean and 2020-01-01 a date."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool", ":timestamp", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
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
        sources = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            path, "no such config file", f"{_meant(path)}check the path; `megachiar config list` names shipped ones"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read as text: {error}", "pass a YAML file in UTF-8") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        lines, twice = _locate(node)
        if twice:
            raise ConfigError(
                str(path),
                [
                    (f"{path}:{line}", Problem(".".join(key), f"stands twice (first on line {lines[key]})", "keep one"))
                    for key, line in twice
                ],
            )
        mapping = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        detail = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(place, f"not valid YAML: {detail}", "mend the syntax at this place") from None
    if not isinstance(mapping, dict):
        raise UserError(
            path,
            f"holds {type(mapping).__name__}, not a mapping of sections",
            "see `megachiar config show tiny`",
        )
    return mapping, lines


def _meant(path: Path) -> str:
    """Return a question where ``path`` may be meant as the name of a shipped config, and nothing else."""
    near = difflib.get_close_matches(path.stem, shipped_configs(), n=1, cutoff=0.75)
    return f"`megachiar config init {near[0]}` writes the shipped config to {near[0]}.yaml; else " if near else ""


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
