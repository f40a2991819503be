"""Write the pages that follow from the code: the config reference, and the list of all error messages.

    python docs/generated_pages.py    writes docs/configuration.md, which is committed, and docs/generated/messages.md,
                                      and fills the tables of docs/findings.md and docs/planning.md

The site's build writes messages.md. A test fails where one of the others is not what this would write.
"""

from __future__ import annotations

import ast
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import clock_tables
import findings_tables
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from megachiar.config import RunConfig

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
INTRODUCTION = """# Configuration

<!-- Written by docs/generated_pages.py from the types in megachiar/config. -->

One YAML file is one run. Every key has a type, a unit and a meaning; this page is made from the code. An unknown key is
refused with the nearest known one. A word of Megatron-LM, GPT-NeoX, DeepSpeed, torchtitan, litgpt or Hugging Face's
`TrainingArguments` is answered with our key for it. All problems of a file are reported at once, each with file, line,
key, value and remedy. `--set a.b=c` overrides a key, and `--a.b=c` is short for it. `megachiar pretrain --dry-run`
prints the resolved config, parameters, memory per rank and FLOPs, and exits.

`megachiar config list` names the shipped configs, and `megachiar config init tiny` copies one. `configs/schema.json`
gives editors completion; `megachiar config schema` prints it.

## `base`

A config may say only what differs from another one:

```yaml
base: 400m.yaml                # a file, by its path from the folder of this one, or else a shipped config by its name

model:
  kind: baseline

logging:
  folder: runs/400m_baseline
```

Mappings are merged key by key. Any other value replaces that of the base; so does a list, as a whole. A base may have a
base. `--set` wins over all of them. The `config.yaml` of a run folder is the whole resolved config, without `base`;
`megachiar config show 400m_baseline --whole` prints that of a shipped one.

## How long a run is

`training` has one of three keys: `steps`, `tokens` or `epochs`. Tokens and epochs become steps, rounded up to the whole
step. The resolved config has both, and they must agree when it is read again. A later one replaces an earlier one:
that of a config replaces that of its base, and `--set training.steps=3` replaces both. Two on
one command line are an error.

- `tokens` are `tokens / (global_batch_size * sequence_length)` steps. They are known when the config is read.
- `epochs` are `epochs * samples / global_batch_size` steps. They are known where the datasets of `data.train` are.

The samples of an epoch are those that one pass over every source holds, `(tokens - 1) // sequence_length` each. A blend
with other weights passes over some sources more often than over others. The log's first lines say how often, and
`data.max_epochs` refuses too often.

## Where to begin

Keys you will touch first:

| section | keys |
|---|---|
| `model` | `kind`, `num_layers`, `hidden_size`, `router.tau`, `meta_router.pool`, `norm` |
| `data` | `train`, `validation`, `sequence_length`, `document_mask` |
| `parallel` | `tensor_size`, `sequence`, `pipeline_size`, `zero_stage`, `offload_optimizer` |
| `precision` | `compute`, `kernels` |
| `optimizer` | `learning_rate`, `weight_decay`, `clip_gradient_norm` |
| `schedule` | `kind`, `warmup_steps` |
| `training` | `steps`, `global_batch_size`, `micro_batch_size`, `activation_checkpoint_interval`, `compile` |
| `checkpoint` | `every`, `keep`, `resume`, `load_from`, `load` |
| `reliability` | `on_spike`, `max_skipped` |
| `logging` | `folder`, `every` |
"""
MESSAGES = """# Every message

Made from the source: each error that a user can mend, with its remedy. `{…}` stands for a value.
[Failures](../failures.md) explains the most common ones.
"""
ERRORS = {"UserError", "LaunchError", "Diverged", "Problem"}


class Key(NamedTuple):
    """One key of a section."""

    name: str
    type: str
    default: str
    meaning: str


def configuration() -> str:
    """Return docs/configuration.md."""
    return INTRODUCTION + "".join(section(name, RunConfig.model_fields[name]) for name in RunConfig.model_fields)


def section(name: str, field: Any) -> str:
    """Return the heading, meaning and table of one section, and those of the sections in it."""
    model = section_of(field.annotation)
    parts = [f"\n## `{name}`\n\n{one_line(field.description)}\n" if "." not in name else f"\n### `{name}`\n"]
    if model is None:
        return parts[0]
    if "." in name and field.description:
        parts.append(f"\n{one_line(field.description)}\n")
    if model.__doc__ and one_line(model.__doc__) not in parts[-1]:
        parts.append(f"\n{one_line(model.__doc__)}\n")
    parts.append("\n| key | type | default | meaning |\n|---|---|---|---|\n")
    nested = []
    for key, each in model.model_fields.items():
        inner = section_of(each.annotation)
        if inner is not None and get_origin(each.annotation) is None:
            nested.append(section(f"{name}.{key}", each))
        else:
            parts.append("| " + " | ".join(Key(*row(key, each))) + " |\n")
            if inner is not None:
                nested.append(section(f"{name}.{key}", each))
    return "".join(parts + nested)


def row(name: str, field: Any) -> Key:
    """Return a key's line of its section's table."""
    if field.default is PydanticUndefined:
        default = "**required**"
    elif section_of(field.annotation) is not None and field.default is not None:
        default = ""
    else:
        default = f"`{show(field.default)}`"
    kind = type_name(field.annotation) + "".join(f", {limit}" for limit in map(limit_of, field.metadata) if limit)
    return Key(f"`{name}`", kind, default, one_line(field.description or ""))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in an annotation, also as the items of a list; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := section_of(each)) is not None), None)


def type_name(annotation: Any) -> str:
    """Return the name of a type in the words of YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        limits = [text for text in map(limit_of, annotation.__metadata__) if text]
        return ", ".join([type_name(arguments[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{show(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if each is type(None) else type_name(each) for each in arguments)
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Path: "path"}
    return names.get(annotation, "mapping" if section_of(annotation) else getattr(annotation, "__name__", "any"))


def limit_of(limit: Any) -> str:
    """Return a limit of a value as text; empty for what is none."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "multiple_of": "a multiple of"}
    inner = getattr(limit, "metadata", None)
    if inner:
        return ", ".join(text for text in map(limit_of, inner) if text)
    return ", ".join(
        f"{word} {getattr(limit, name):g}" for name, word in words.items() if getattr(limit, name, None) is not None
    )


def show(value: Any) -> str:
    """Return a value as YAML writes it."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(show, value))}]"
    if value is None or isinstance(value, (bool, dict)):
        return json.dumps(value)
    return str(value)


def one_line(text: str) -> str:
    """Return a text on one line, without what a table or HTML would take for its own."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")


def messages() -> str:
    """Return docs/generated/messages.md: all messages by file."""
    parts = [MESSAGES]
    for path in [*sorted((ROOT / "megachiar").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]:
        found = sorted(set(messages_of(path)))
        if found:
            parts.append(f"\n## {path.relative_to(ROOT)}\n\n| where | message | remedy |\n|---|---|---|\n")
            parts += [f"| {where} | {problem} | {remedy} |\n" for where, problem, remedy in found]
    return "".join(parts)


def messages_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (where, problem, remedy) of each error that a file raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and len(node.args) in (2, 3):
            problem = template(node.args[1])
            if re.search(r"[a-z]{3}", re.sub(r"\{[^}]*\}", "", problem)):
                where, remedy = template(node.args[0]), template(node.args[2]) if len(node.args) == 3 else ""
                yield code(where), code(problem), code(remedy)


def template(node: ast.expr) -> str:
    """Return the text of an expression with its values left open."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    names = [each.attr if isinstance(each, ast.Attribute) else each.id for each in ast.walk(node) if _is_name(each)]
    return "{" + (names[0] if len(names) == 1 else "…") + "}"


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute))


def code(text: str) -> str:
    """Return a text as inline code that a table can hold."""
    quote = "``" if "`" in text else "`"
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return f"{quote}{' ' if quote == '``' else ''}{text}{' ' if quote == '``' else ''}{quote}" if text else ""


def write_messages() -> None:
    """Write docs/generated/messages.md."""
    (DOCS / "generated").mkdir(exist_ok=True)
    (DOCS / "generated" / "messages.md").write_text(messages(), encoding="utf-8")


def main() -> None:
    (DOCS / "configuration.md").write_text(configuration(), encoding="utf-8")
    for tables in (findings_tables, clock_tables):
        tables.PAGE.write_text(tables.filled(tables.PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    write_messages()


if __name__ == "__main__":
    main()
