"""Type each section of a config by itself, so that a bad one does not hide the problems of the others."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megachiar.config.errors import Problem
from megachiar.config.run import RunConfig
from megachiar.config.unknown_keys import ConfigKeys, unknown_key

_Section = TypeVar("_Section", bound=BaseModel)


def type_sections(mapping: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Type the sections of a config.

    Returns:
        the typed sections by name, without those that have a problem, and all problems.
    """
    sections: dict[str, Any] = {}
    problems: list[Problem] = []
    fields = RunConfig.model_fields
    for name, value in mapping.items():
        if name not in fields:
            problems += unknown_key((str(name),), value, list(fields), config_keys())
    for name, field in fields.items():
        value = mapping.get(name)
        section = section_class(field.annotation)
        if name not in mapping and not field.is_required():
            sections[name] = field.default
        elif name not in mapping:
            problems.append(Problem(name, "section is missing", f"add `{name}:`; see `megachiar config show tiny`"))
        elif not isinstance(value, dict):
            keys = f": {', '.join(section.model_fields)}" if section is not None else ""
            problems.append(
                Problem(name, f"is {_shown(value)}, not a mapping of keys", f"write keys below `{name}:`{keys}")
            )
        elif section is None:
            sections[name] = value
        else:
            typed, found = type_section(section, value, (name,), config_keys())
            problems += found
            if typed is not None:
                sections[name] = typed
    return sections, problems


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Return the section in an annotation, also as the items of a list; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_class(part)) is not None), None)


@functools.cache
def config_keys() -> ConfigKeys:
    """Return the dotted keys of a config by their last name."""
    keys: ConfigKeys = {}

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            inner = section_class(field.annotation)
            if inner is None:
                keys.setdefault(name, []).append(f"{prefix}{name}")
            elif get_origin(field.annotation) is None:  # the keys of a list's items belong in the list alone
                walk(inner, f"{prefix}{name}.")

    walk(RunConfig, "")
    return keys


def type_section(
    section: type[_Section], value: dict[str, Any], path: tuple[str, ...], known_keys: ConfigKeys
) -> tuple[_Section | None, list[Problem]]:
    """Type one section.

    Args:
        section: its class.
        value: the mapping.
        path: names of the sections that it stands in, its own last.
        known_keys: keys that a misplaced key may mean, by their last name.

    Returns:
        the typed section, None if it has a problem, and all problems.
    """
    text = json.dumps(value, default=str)
    try:
        # Strict JSON mode: no string for a number, but a list for a tuple and a string for a path.
        return section.model_validate_json(text, strict=True), []
    except ValidationError as error:
        located = _by_key(error, json.loads(text))
        finder = _ProblemFinder(section, path, known_keys)
        return None, [problem for below, arms in located for problem in finder.problems(below, arms)]


def _by_key(error: ValidationError, value: Any) -> list[tuple[tuple[str, ...], list[ErrorDetails]]]:
    """Return the problems of each key path; a union reports each of its arms."""
    kept: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        kept.setdefault(tuple(_key_path(detail, value)), []).append(detail)
    # An arm that looked inside the value and one that did not, or a list short of its bad items: the inner one says it.
    return [
        (path, arms)
        for path, arms in kept.items()
        if not any(other[: len(path)] == path and other != path for other in kept)
    ]


def _key_path(detail: ErrorDetails, value: Any) -> Iterator[str]:
    """Yield keys and indices of pydantic's location of a problem, without the names of a union's arms in it."""
    for number, part in enumerate(detail["loc"], 1):
        if isinstance(value, dict) and part in value:
            value = value[part]
            yield str(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else None
            yield str(part)
        elif detail["type"] == "missing" and number == len(detail["loc"]):
            yield str(part)


class _ProblemFinder(NamedTuple):
    """Tells in words what pydantic has found wrong with a section; see ``type_section``."""

    section: type[BaseModel]
    path: tuple[str, ...]
    known_keys: ConfigKeys

    def problems(self, below: tuple[str, ...], arms: list[ErrorDetails]) -> Iterator[Problem]:
        """Yield the problems of the value at ``below``, of which each arm of a union reports one."""
        path = (*self.path, *below)
        key, detail = ".".join(path), arms[0]
        if detail["type"] == "extra_forbidden":
            known = list(_class_at(self.section, below[:-1]).model_fields)
            yield from unknown_key(path, detail["input"], known, self.known_keys)
            return
        if detail["type"] == "missing":
            parent = ".".join(path[:-1])
            if path[-1].isdigit():
                yield Problem(parent, f"lacks value {int(path[-1]) + 1} of its list", "give every value of the list")
            else:
                remedy = f"add `{path[-1]}:` below `{parent}:`" if parent else f"add `{path[-1]}:`"
                yield Problem(key, "is missing and has no default", remedy)
            return
        wanted = " or ".join(dict.fromkeys(_wanted(arm) for arm in arms))
        yield Problem(key, f"is {_shown(detail['input'])}, must be {wanted}", f"set it to {wanted}")


_WANTED = {
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_type": "a string",
    "path_type": "a path",
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}
"""The expected value, by pydantic's name of the problem; other problems keep pydantic's words."""


def _wanted(detail: ErrorDetails) -> str:
    """Return the expected value, as a noun."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        several = " or " in context["expected"]
        return f"{'one of ' if several else ''}{context['expected']}"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    wanted = _WANTED.get(kind, detail["msg"].removeprefix("Input should be "))
    return wanted if wanted.startswith(("a ", "an ", "true ")) else f"a value {wanted}"


def _class_at(section: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """Return the section that the keys below ``path`` belong to."""
    is_name = False  # of an item of a mapping, which is no key
    for name in path:
        if is_name or name.isdigit():
            is_name = False
            continue
        annotation = section.model_fields[name].annotation
        inner = section_class(annotation)
        assert inner is not None, f"{name} has no keys"
        section, is_name = inner, get_origin(annotation) is dict
    return section


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
