"""The JSON schema that lets an editor complete and check a config."""

from __future__ import annotations

from typing import Any

from megachiar.config.bases import BASE
from megachiar.config.run import RunConfig
from megachiar.config.run_length import LENGTHS
from megachiar.config.typed_sections import section_class


def config_schema() -> dict[str, Any]:
    """Return the schema of a config file: a key that every run needs may be left to the base where there is one."""
    schema = RunConfig.model_json_schema()
    base = {"type": "string", "description": "Config that this one differs from: a path from its folder, or a name."}
    schema["properties"] = {BASE: base, **schema["properties"]}
    del schema["required"]
    needed: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        section = section_class(field.annotation)
        if section is not None and (keys := schema["$defs"][section.__name__].pop("required", [])):
            needed[name] = {"required": keys}
    # Of the three lengths of a run one is enough.
    needed["training"]["anyOf"] = [{"required": [name]} for name in reversed(LENGTHS)]
    required = [name for name, field in RunConfig.model_fields.items() if field.is_required()]
    whole = {"required": required, "properties": needed}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "if": {"not": {"required": [BASE]}},
        "then": whole,
    }
