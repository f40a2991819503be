"""The typed config becomes DeepSpeed's dict; one table says which raw key each typed key owns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megachiar.config.errors import Problem

if TYPE_CHECKING:
    from megachiar.config.run import RunConfig

# DeepSpeed key -> (typed key, its value). A raw key under `deepspeed:` may repeat such a value, never contradict it.
OWNED: dict[str, tuple[str, Callable[[RunConfig], Any]]] = {
    "train_batch_size": ("training.global_batch_size", lambda c: c.training.global_batch_size),
    "train_micro_batch_size_per_gpu": ("training.micro_batch_size", lambda c: c.training.micro_batch_size),
    "gradient_clipping": ("optimizer.clip_gradient_norm", lambda c: c.optimizer.clip_gradient_norm or 0.0),
    "zero_optimization.stage": ("parallel.zero_stage", lambda c: c.parallel.zero_stage),
    "bf16.enabled": ("precision.compute", lambda c: c.precision.compute == "bf16"),
    "fp16.enabled": ("precision.compute", lambda c: c.precision.compute == "fp16"),
    "fp16.loss_scale": (
        "precision.loss_scale",
        lambda c: 0.0 if c.precision.loss_scale == "dynamic" else float(c.precision.loss_scale),
    ),
    "fp16.initial_scale_power": (
        "precision.initial_loss_scale",
        lambda c: int(math.log2(c.precision.initial_loss_scale)),
    ),
    "fp16.loss_scale_window": ("precision.loss_scale_window", lambda c: c.precision.loss_scale_window),
    "data_types.grad_accum_dtype": ("precision.gradient_accumulation", lambda c: c.precision.gradient_accumulation),
}
# Raw keys that are refused whatever their value: a typed section has the whole subject.
REPLACED = {
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "pipeline": "parallel.pipeline_size",
    "amp": "precision.compute",
    "activation_checkpointing": "training.activation_checkpoint_interval",
}
# Raw keys that let DeepSpeed measure or log by itself. It would make a second set of curves or figures beside ours.
_CURVES = "logging.tensorboard, or read metrics.jsonl in the run folder"
MONITORS = {
    "tensorboard": _CURVES,
    "wandb": _CURVES,
    "csv_monitor": _CURVES,
    "comet": _CURVES,
    "flops_profiler": "model_flops_per_second in metrics.jsonl, or --dry-run, which know routed layers and our kernels",
}
DEFAULTS = {
    "steps_per_print": 2**31 - 1,
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
    # Only sequence parallelism shards the hidden states that are sent between stages, never DeepSpeed.
    "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    # Elements that one bucket of gradients holds. DeepSpeed's own 5e8 are 2 GB of fp32, which ZeRO 3 always holds.
    "zero_optimization": {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
}
# With offload, torch's own fused AdamW runs on the host, since DeepSpeed's needs a compiler.
OFFLOAD = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def to_deepspeed(config: RunConfig) -> dict[str, Any]:
    """Return the dict for ``deepspeed.initialize``: the typed keys, then the raw keys of ``deepspeed:``."""
    result: dict[str, Any] = copy.deepcopy(DEFAULTS)
    for key, (_, value) in OWNED.items():
        _put(result, key.split("."), value(config))
    for section in ("bf16", "fp16"):
        if not result[section]["enabled"]:
            del result[section]
    for path, value in (*_leaves(OFFLOAD if config.parallel.offload_optimizer else {}), *_leaves(config.deepspeed)):
        _put(result, list(path), value)
    return result


def contradictions(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each raw key that contradicts a typed key or that this project does not pass through."""
    for path, value in _leaves(config.deepspeed):
        key, top = ".".join(path), path[0]
        if top in REPLACED:
            yield Problem(f"deepspeed.{key}", "is set by typed keys, not raw ones", f"use {REPLACED[top]}")
        elif top in MONITORS:
            problem = f"is DeepSpeed's own {top}, which would report a second time what this project reports"
            yield Problem(f"deepspeed.{key}", problem, f"remove it and use {MONITORS[top]}")
        elif key in OWNED and OWNED[key][1](config) != value:
            typed, owned = OWNED[key]
            yield Problem(
                f"deepspeed.{key}",
                f"is {value!r}, but {typed} makes it {owned(config)!r}",
                f"remove the raw key and set {typed}",
            )


def _leaves(mapping: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


def _put(mapping: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        mapping = mapping.setdefault(key, {})
    mapping[path[-1]] = value
