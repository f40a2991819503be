"""Describe a run's model as the ``config.json`` of an export to Hugging Face, and refuse what that model cannot be.

``modeling_chiar.py`` has the model. Its settings are those of ``model:`` by the names that transformers uses, and what
follows from the weights: thresholds that training has found. The section ``megachiar`` has what an import needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megachiar import __version__
from megachiar.checkpoint.format import CheckpointState
from megachiar.config import ModelConfig, RunConfig
from megachiar.config.tasks import RunTask
from megachiar.errors import UserError
from megachiar.kernels.spectral import white_noise_entropy

EXPORT_FORMAT = 1
RUNNING = ".value"
"""The end of the names of the numbers that a run keeps beside its weights; an export has them in ``config.json``."""
MODEL_FILE = "modeling_chiar.py"
_CLASSES = {
    "AutoConfig": "modeling_chiar.ChiarConfig",
    "AutoModel": "modeling_chiar.ChiarModel",
    "AutoModelForSequenceClassification": "modeling_chiar.ChiarForSequenceClassification",
}
_KEPT_SECTIONS = ("task", "precision", "optimizer", "schedule", "training")


def check_exportable(checkpoint: Path, config: RunConfig) -> None:
    """Check that the library's model can be what the run's model is.

    Raises:
        UserError: its gate averages over the batch.
    """
    model = config.model
    if model.kind == "chiar" and model.meta_router.pool == "batch":
        raise UserError(
            checkpoint,
            "model.meta_router.pool is batch: the gate of layer 1 averages over all tokens of a batch, later ones "
            "included, so that logits depend on the other sequences and nothing can be generated token by token",
            "export a run with meta_router.pool causal or none, or use --to published, which keeps such a gate",
        )


def task_of(config: RunConfig, name: str | None) -> RunTask:
    """Return the task that is exported: the one named, or the main one.

    Raises:
        UserError: the run has no such task.
    """
    for task in config.tasks:
        if name in (None, task.name):
            return task
    names = ", ".join(task.name for task in config.tasks)
    raise UserError(f"--task {name}", "the run has no such task", f"name one of {names}")


def describe_export(
    config: RunConfig, task: RunTask, state: CheckpointState, running: Mapping[str, float]
) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Args:
        config: of the run.
        task: that is exported.
        state: of the checkpoint.
        running: numbers that the run keeps beside its weights, by name.
    """
    is_classifier = task.head is not None
    classes = dict(_CLASSES)
    if not is_classifier:
        classes["AutoModelForCausalLM"] = "modeling_chiar.ChiarForCausalLM"
    main = classes["AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"]
    content = {
        "architectures": [main.partition(".")[2]],
        "auto_map": classes,
        "model_type": "chiar",
        "dtype": "float32",
        "tie_word_embeddings": True,
        "use_cache": True,
        **model_settings(config.model, running),
        "document_end": config.document_end if not is_classifier else None,
    }
    if task.head is not None:
        names = state.classes_of(task.name) or [f"LABEL_{number}" for number in range(task.head.classes)]
        content |= {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "single_label_classification",
            "head": task.head.kind,
            "padding": task.head.padding,
            "classified_length": config.sequence_length,
        }
    return content | {"megachiar": _for_an_import(config, task, state, running)}


def model_settings(model: ModelConfig, running: Mapping[str, float]) -> dict[str, Any]:
    router = model.router
    return {
        "kind": model.kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": model.max_sequence_length,
        "norm": model.norm,
        "norm_epsilon": model.norm_epsilon,
        "dropout": model.dropout,
        "initializer_range": model.initializer_std,
        "embedding_multiplier": model.embedding_multiplier,
        "rope_base": model.attention.rope_base,
        "dct_gain": model.dct.gain,
        "entropy_dc_weight": model.dct.entropy_dc_weight,
        "entropy_epsilon": model.dct.entropy_epsilon,
        "router": router.kind,
        "operators": list(router.operators),
        "thresholds": [_thresholds(model, layer, running) for layer in model.routed_layers],
        "thresholds_run": router.target_share is not None,
        "noise": list(white_noise_entropy(model.hidden_size)),
        "router_seed": router.seed,
        "hard_gradient": router.hard_gradient,
        "keys": model.attention.keys,
        "rbf_features": model.rbf.features,
        "rbf_gamma": model.rbf.gamma,
        "gate": model.meta_router.pool if model.kind == "chiar" else "none",
    }


def _thresholds(model: ModelConfig, layer: int, running: Mapping[str, float]) -> list[float]:
    """Return the numbers between the operators of a routed layer, in rising order; none where gates decide."""
    router = model.router
    if router.target_share is not None:
        return [running[f"layers.{layer}.router.running_threshold{RUNNING}"]]
    if router.has_thresholds:
        if len(router.operators) == 3:
            return [model.threshold("tau_low", layer), model.threshold("tau_high", layer)]
        return [model.threshold("tau", layer)]
    if router.kind != "random":
        return []
    below = 1 - (router.attention_share or 0.0)
    return [below] if len(router.operators) == 2 else [below - (router.rbf_share or 0.0), below]


def _for_an_import(
    config: RunConfig, task: RunTask, state: CheckpointState, running: Mapping[str, float]
) -> dict[str, Any]:
    """Return the section that an import makes a run of: no path of this machine is in it."""
    whole = config.model_dump(mode="json")
    kept = {name: whole[name] for name in _KEPT_SECTIONS}
    if task.name in config.mixed.tasks:
        kept["task"] = {key: whole["mixed"]["tasks"][task.name][key] for key in kept["task"]}
    return {
        "format": EXPORT_FORMAT,
        "created_by": f"megachiar {__version__}",
        "step": state.step,
        "validation": dict(state.validation),
        "running": dict(running),
        "model": whole["model"],
        "data": {
            "sequence_length": config.sequence_length,
            "document_mask": config.data.document_mask,
            "document_end": config.data.document_end,
        },
        **kept,
    }
