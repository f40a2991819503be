"""One YAML file is one run: read it with its bases, type it, check it, and report everything that is wrong at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megachiar.config import checks
from megachiar.config.bases import Places, read_with_bases
from megachiar.config.deepspeed import contradictions
from megachiar.config.errors import ConfigError
from megachiar.config.overrides import apply_override
from megachiar.config.run import RunConfig
from megachiar.config.run_length import steps_of_tokens
from megachiar.config.typed_sections import type_sections
from megachiar.config.yaml_file import read_source_list


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the config at ``path`` and its bases, apply overrides and check everything.

    Args:
        path: the YAML file.
        overrides: each ``"a.b=value"`` with the value in YAML; a later one wins.

    Raises:
        UserError: a file cannot be read as a YAML mapping, a base is missing, or an override is no ``key=value``.
        ConfigError: names all problems of the content together.
    """
    path = Path(path)
    mapping, places = read_with_bases(path)
    overridden = {}
    for override in overrides:
        key = apply_override(mapping, override)
        overridden[tuple(key.split("."))] = override
    data = mapping.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), str):
        data["train"] = read_source_list(Path(data["train"]))
    return parse_config(mapping, str(path), places, overridden)


def parse_config(
    mapping: dict[str, Any],
    source: str,
    places: Places | None = None,
    overridden: dict[tuple[str, ...], str] | None = None,
) -> RunConfig:
    """Turn a mapping into a checked ``RunConfig``.

    Args:
        mapping: the content of a config without ``base``.
        source: the name of the config in messages.
        places: file and line of each key path.
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
    raise ConfigError(source, [(_place(p.key, source, places or {}, overridden or {}), p) for p in problems])


def _with_steps_of_tokens(config: RunConfig) -> RunConfig:
    tokens = config.training.tokens
    if tokens is None:
        return config
    return config.with_steps(steps_of_tokens(tokens, config.training.global_batch_size, config.sequence_length))


def _place(key: str, source: str, places: Places, overridden: dict[tuple[str, ...], str]) -> str:
    """Return ``file:line`` of the longest known part of ``key``, or the override that set it."""
    parts = tuple(key.split("."))
    for size in range(len(parts), 0, -1):
        if parts[:size] in overridden:
            return f"--set {overridden[parts[:size]]}"
        if parts[:size] in places:
            return places[parts[:size]]
    return source
