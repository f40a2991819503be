"""What makes two runs one and the same: the keys of a config that decide its result, and their digest.

Keys that say where files lie, how the work is shared out or how fast it goes are left out: a layout is no part of a
result. So are keys with their default, so that a key which a later version adds changes no digest.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from megachiar.config.run import RunConfig, flatten
from megachiar.config.run_length import LENGTHS, asked_length

_OF_NO_RESULT = {
    "checkpoint": {"every", "keep", "keep_every", "asynchronous", "on_failure", "resume", "export_hf"},
    "data": {"document_end", "max_epochs", "on_change", "prefetch", "tokenizer", "verify"},
    "evaluation": {"at_start", "batch_size", "include_path", "new_tokens", "prompts", "temperature"},
    "logging": {"folder", "every", "page", "tensorboard", "wandb", "mlflow", "trackio"},
    "optimizer": {"implementation"},
    "parallel": {"pipeline_size", "tensor_size", "data_size", "sequence", "zero_stage", "offload_optimizer"},
    "precision": {"kernels"},
    "profiling": {"steps", "ranks", "memory"},
    "reliability": {"check_every"},
    "training": {
        *("activation_checkpoint_interval", "communication_timeout_s", "compile", "static_shapes", "stop_after"),
        *("cuda_graphs", "threads"),
    },
}
"""The keys of each section that decide nothing of a result but its last bits. The end of documents is that of the
data."""


def deciding_keys(config: RunConfig) -> dict[str, Any]:
    """Return the value of each key that decides the result and differs from its default, by dotted key.

    Of the three lengths of a run the one that was asked for counts. A config and its resolved form have the same keys.
    """
    sections = config.model_dump(mode="json", exclude_defaults=True)
    for name, keys in _OF_NO_RESULT.items():
        sections[name] = {key: value for key, value in sections.get(name, {}).items() if key not in keys}
    asked, _ = asked_length(config.training)
    for length in LENGTHS:
        if length != asked:
            sections["training"].pop(length, None)
    return {key: value for key, value in flatten(sections, "") if value != {}}


def config_digest(config: RunConfig) -> str:
    """Return ``"sha256:..."`` of ``deciding_keys``: two configs with the same one ask for the same result."""
    content = json.dumps(deciding_keys(config), sort_keys=True)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
