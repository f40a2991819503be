"""One YAML file is one run: read it with its bases, type it, check it, and report all problems at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megachiar.config import checks
from megachiar.config.bases import Locations, read_with_bases
from megachiar.config.deepspeed import contradictions
from megachiar.config.errors import ConfigError, Problem
from megachiar.config.overrides import Overridden, apply_overrides, set_key
from megachiar.config.run import RunConfig
from megachiar.config.run_length import LENGTHS, drop_other_lengths, steps_of_tokens
from megachiar.config.typed_sections import type_sections
from megachiar.config.yaml_file import read_source_list


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the config at ``path`` and its bases, apply overrides and check everything.

    Args:
        path: the YAML file.
        overrides: each ``"a.b=value"`` with the value in YAML; of one key a later one wins.

    Raises:
        UserError: a file cannot be read as a YAML mapping, a base is missing, or an override is no ``key=value``.
        ConfigError: names all problems of the content together.
    """
    path = Path(path)
    mapping, locations = read_with_bases(path)
    return parse_with_overrides(mapping, overrides, str(path), locations)


class Setting(NamedTuple):
    """A value that a file gives a key of a config from outside of it.

    Attributes:
        key: dotted; items of a list are addressed by index.
        value: as YAML has it.
        where: file and line that say so.
    """

    key: str
    value: Any
    where: str


def load_with_settings(path: Path, settings: Sequence[Setting], source: str) -> RunConfig:
    """Read the config at ``path`` and its bases, set keys in it and check everything.

    Args:
        path: the YAML file.
        settings: a later one wins over an earlier one, and a later length of the run over an earlier one.
        source: the name of the result in messages.

    Raises:
        UserError, ConfigError: as ``load_config``; places are those of the settings where one has set the key.
    """
    mapping, locations = read_with_bases(path)
    for key, value, where in settings:
        section, _, name = key.partition(".")
        if section == "training" and name in LENGTHS:
            drop_other_lengths(mapping.get("training"), {name: value})
        set_key(mapping, key, copy.deepcopy(value), where)
        parts = tuple(key.split("."))
        locations = {at: place for at, place in locations.items() if at[: len(parts)] != parts} | {parts: where}
    _read_sources(mapping)
    return parse_config(mapping, source, locations)


def parse_with_overrides(
    mapping: dict[str, Any], overrides: Sequence[str], source: str, locations: Locations | None = None
) -> RunConfig:
    """Apply overrides to a mapping without ``base`` and check everything; see ``load_config`` and ``parse_config``."""
    overridden, problems = apply_overrides(mapping, overrides)
    if problems:  # what else is wrong may follow from them
        raise _error(source, problems, locations or {}, overridden)
    _read_sources(mapping)
    return parse_config(mapping, source, locations, overridden)


def _read_sources(mapping: dict[str, Any]) -> None:
    """Put the list of sources in place of the name of the file that holds it."""
    data = mapping.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), str):
        data["train"] = read_source_list(Path(data["train"]))


def parse_config(
    mapping: dict[str, Any],
    source: str,
    locations: Locations | None = None,
    overridden: Overridden | None = None,
) -> RunConfig:
    """Turn a mapping into a checked ``RunConfig``.

    Args:
        mapping: the content of a config without ``base``.
        source: the name of the config in messages.
        locations: file and line of each key path.
        overridden: the override that set each key path.

    Raises:
        ConfigError: names all problems together.
    """
    sections, problems = type_sections(mapping)
    problems += checks.run(sections)
    if not problems:
        config = _with_steps_of_tokens(RunConfig(**sections))
        problems += contradictions(config)
        if not problems:
            return config
    raise _error(source, problems, locations or {}, overridden or {})


def _error(source: str, problems: Sequence[Problem], locations: Locations, overridden: Overridden) -> ConfigError:
    return ConfigError(
        source, [(_location(problem.key, source, locations, overridden), problem) for problem in problems]
    )


def _with_steps_of_tokens(config: RunConfig) -> RunConfig:
    tokens = config.training.tokens
    if tokens is None:
        return config
    return config.with_steps(steps_of_tokens(tokens, config.training.global_batch_size, config.sequence_length))


def _location(key: str, source: str, locations: Locations, overridden: Overridden) -> str:
    """Return the override that set ``key`` or a section around it, else ``file:line`` of its longest known part.

    A key that no file has comes from an override of something below it.
    """
    parts = tuple(key.split("."))
    if parts not in locations:
        below = (override for path, override in overridden.items() if path[: len(parts)] == parts)
        if (override := next(below, None)) is not None:
            return f"--set {override}"
    parents = [parts[:size] for size in range(len(parts), 0, -1)]
    for part in parents:
        if part in overridden:
            return f"--set {overridden[part]}"
    return next((locations[part] for part in parents if part in locations), source)
