"""One YAML file = one run: read it, type it, check it, and say everything that is wrong at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megachiar.config import checks
from megachiar.config.deepspeed import contradictions
from megachiar.config.errors import ConfigError, Problem
from megachiar.config.model import ModelConfig
from megachiar.config.section import Section
from megachiar.config.sections import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainingConfig,
)
from megachiar.config.yaml_file import Lines, parse_value, read_source_list, read_yaml
from megachiar.errors import UserError


class RunConfig(Section):
    """Everything a run depends on."""

    model: ModelConfig
    """What is trained."""
    data: DataConfig
    """What it is trained and validated on."""
    parallel: ParallelConfig = ParallelConfig()
    """How the work is split over ranks. A matter of speed and memory alone."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    optimizer: OptimizerConfig
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps."""
    training: TrainingConfig
    """How long, how much at once, how often evaluated."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save and what to start from."""
    logging: LoggingConfig
    """The run folder and what is written there."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed keys, passed through; one that contradicts a typed key is refused."""

    @property
    def sample_order(self) -> str:
        """What fixes the order of samples beside the seed: Megatron's depends on the length of the run."""
        if self.data.order == "keyed":
            return "keyed"
        return f"megatron over {self.training.steps * self.training.global_batch_size} samples"

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sample."""
        return self.data.sequence_length or self.model.max_sequence_length

    @property
    def document_end(self) -> int | None:
        """Token that ends a document, if no token is to see another document's."""
        return self.data.document_end if self.data.document_mask else None

    @property
    def checkpoint_folder(self) -> Path:
        return self.logging.folder / "checkpoints"

    def to_yaml(self) -> str:
        """The resolved config, defaults included; ``load_config`` reads it back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``overrides`` (``"a.b=value"``, the value in YAML) and check everything.

    Raises:
        UserError: the file cannot be read as a YAML mapping, or an override is no ``key=value``.
        ConfigError: all problems of the content together.
    """
    path = Path(path)
    mapping, lines = read_yaml(path)
    overridden = {}
    for override in overrides:
        key = _apply_override(mapping, override)
        overridden[tuple(key.split("."))] = override
    data = mapping.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), str):
        data["train"] = read_source_list(Path(data["train"]))
    return parse_config(mapping, str(path), lines, overridden)


def parse_config(
    mapping: dict[str, Any],
    source: str,
    lines: Lines | None = None,
    overridden: dict[tuple[str, ...], str] | None = None,
) -> RunConfig:
    """Turn a mapping into a checked ``RunConfig``; ``source`` (and ``lines``) say where each problem stands."""
    sections, problems = _type_sections(mapping)
    problems += checks.run(sections)
    if not problems:
        config = RunConfig(**sections)
        problems += contradictions(config)
        if not problems:
            return config
    raise ConfigError(source, [(_place(p.key, source, lines or {}, overridden or {}), p) for p in problems])


def _apply_override(mapping: dict[str, Any], override: str) -> str:
    """Set one dotted key in ``mapping``; list items are addressed by index (``data.train.0.path=...``)."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}", "is not KEY=VALUE", "write for example --set training.steps=100")
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}", f"value {text!r} is not valid YAML", "quote the value") from None
    *parents, last = key.split(".")
    node: Any = mapping
    for depth, name in enumerate(parents):
        node = _child(node, name, override, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_list_index(node, last, override, ".".join(parents))] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {override}", f"{'.'.join(parents)} holds a value, not keys", "set that key itself")
    return key


def _child(node: Any, name: str, override: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, name, override, key)]
    if isinstance(node, dict):
        if node.get(name) is None:
            node[name] = {}
        return node[name]
    raise UserError(f"--set {override}", f"{key} is below a value, not below keys", "check the key's path")


def _list_index(node: list[Any], name: str, override: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise UserError(
            f"--set {override}", f"{key} is a list of {len(node)}, {name!r} is no index in it", "use 0, 1, ..."
        )
    return int(name)


def _type_sections(mapping: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Type each section by itself, so that one bad section does not hide the problems of the others."""
    sections: dict[str, Any] = {}
    problems: list[Problem] = []
    fields = RunConfig.model_fields
    for name in mapping:
        if name not in fields:
            problems.append(_unknown_key((), str(name), list(fields)))
    for name, field in fields.items():
        value = mapping.get(name)
        if name not in mapping and not field.is_required():
            sections[name] = field.default
        elif name not in mapping:
            problems.append(Problem(name, "section is missing", f"add `{name}:`; see `megachiar config show tiny`"))
        elif not isinstance(value, dict):
            problems.append(Problem(name, f"is {_show(value)}, not a mapping of keys", f"write keys below `{name}:`"))
        elif name == "deepspeed":
            sections[name] = value
        else:
            try:
                # Strict JSON mode: no string for a number, but a list for a tuple and a string for a path.
                sections[name] = field.annotation.model_validate_json(json.dumps(value, default=str), strict=True)
            except ValidationError as error:
                problems += [_from_pydantic(name, field.annotation, e) for e in _one_per_key(error)]
    return sections, problems


def _one_per_key(error: ValidationError) -> list[dict[str, Any]]:
    """A union reports each of its arms: keep the first for a key path, without the arm's own name."""
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    for detail in error.errors(include_url=False):
        location = tuple(str(part) for part in detail["loc"] if _is_key(part))
        kept.setdefault(location, {**detail, "loc": location})
    # An arm that looked inside the value and one that did not, or a list short of its bad items: the inner one says it.
    return [d for loc, d in kept.items() if not any(other[: len(loc)] == loc and other != loc for other in kept)]


def _is_key(part: int | str) -> bool:
    """Whether pydantic's location part is a key or index of the YAML, not the name of a union's arm."""
    return isinstance(part, int) or not (set(part) & set("[](),-") or part in {"float", "int", "str"})


def _from_pydantic(section: str, model: type[BaseModel], detail: dict[str, Any]) -> Problem:
    path = (section, *detail["loc"])
    key, kind, context = ".".join(path), detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path[:-1], path[-1], list(_class_at(model, path[1:-1]).model_fields))
    if kind == "missing":
        return Problem(key, "is missing and has no default", f"add `{path[-1]}:` below `{'.'.join(path[:-1])}:`")
    wanted = detail["msg"].removeprefix("Input should be ")
    if kind == "literal_error":
        wanted = f"one of {context['expected']}"
    elif kind == "too_short":
        wanted = f"a list of at least {context['min_length']}"
    elif not wanted.startswith("a "):
        wanted = f"a value {wanted}"
    return Problem(key, f"is {_show(detail['input'])}, must be {wanted}", f"set it to {wanted}")


def _class_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The section class that the keys below ``path`` belong to."""
    for name in path:
        if name.isdigit():
            continue
        annotation = model.model_fields[name].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model


def _unknown_key(parents: Sequence[str], name: str, known: list[str]) -> Problem:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean `{near[0]}`?" if near else "remove it"
    return Problem(".".join((*parents, name)), "is not a known key", f"{remedy} Known: {', '.join(known)}")


def _place(key: str, source: str, lines: Lines, overridden: dict[tuple[str, ...], str]) -> str:
    """``file:line`` of the longest known part of ``key``, or the override that set it."""
    parts = tuple(key.split("."))
    for size in range(len(parts), 0, -1):
        if parts[:size] in overridden:
            return f"--set {overridden[parts[:size]]}"
        if parts[:size] in lines:
            return f"{source}:{lines[parts[:size]]}"
    return source


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
