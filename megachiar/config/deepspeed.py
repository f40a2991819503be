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
# Raw keys that switch off a check of ours or change silently what the typed keys say, each with the one value that does
# not. None stands for every value: nothing of the section can be used.
_OWN_CHECK = "would hide gradients that are not finite from the check before each step"
_MASTER_WEIGHTS = "would keep weights and moments in 16 bits, but the run says and saves fp32"
_FEWER_BITS = "would send numbers of fewer bits than precision.compute says"
_OWN_LAYOUT = "would lay out the ranks in another way than the section parallel says"
_OWN_DATA = "would change what the model reads, which data and training.seed decide"
HARMFUL: dict[str, tuple[Any, str, str]] = {
    "zero_optimization.compute_grad_norm": (True, _OWN_CHECK, ""),
    "bf16.check_grad_overflow": (True, _OWN_CHECK, ""),
    "bf16.bf16_master_weights_and_grads": (False, _MASTER_WEIGHTS, ""),
    "bf16.bf16_optimizer_states": (False, _MASTER_WEIGHTS, ""),
    "fp16.fp16_master_weights_and_grads": (False, _MASTER_WEIGHTS, ""),
    "zero_optimization.zero_quantized_weights": (False, _FEWER_BITS, ""),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _FEWER_BITS, ""),
    "zero_optimization.zero_quantized_gradients": (False, _FEWER_BITS, ""),
    "bfloat16": (None, "would set the precision a second time", "precision.compute"),
    "torch_autocast": (None, "would set the precision a second time", "precision.compute"),
    "gradient_allreduce_op": ("mean", "would multiply the gradients by the number of replicas", ""),
    "managed_gradient_accumulation": (True, "would leave the micro-batches of a step to the caller", ""),
    "zero_optimization.zenflow": (None, "would apply gradients of earlier steps", ""),
    "zero_optimization.cpu_offload": (False, "is DeepSpeed's old key for offloading", "parallel.offload_optimizer"),
    "tensor_parallel": (None, _OWN_LAYOUT, "parallel.tensor_size"),
    "expert_parallel": (None, _OWN_LAYOUT, ""),
    "sequence_parallel_size": (1, _OWN_LAYOUT, "parallel.sequence"),
    "data_parallel_size": (None, _OWN_LAYOUT, "parallel.data_size"),
    "hybrid_engine": (None, "would replace the engine that trains", ""),
    "data_efficiency": (None, _OWN_DATA, ""),
    "compression_training": (None, "would prune or quantize the weights while they are trained", ""),
    "weight_quantization": (None, "would quantize the weights", ""),
    "compile": (None, "would compile the model a second time", "training.compile"),
}
# Raw keys that let DeepSpeed measure or log by itself. It would make a second set of curves or figures beside ours.
_CURVES = "logging.tensorboard, logging.wandb, logging.mlflow or logging.trackio, or read metrics.jsonl"
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
    # DeepSpeed's own would wait for the GPU twice in each micro-batch. Ours is in metrics.jsonl.
    "timers": {"throughput": {"enabled": False}},
    "zero_allow_untested_optimizer": True,
    # Only sequence parallelism shards the hidden states that are sent between stages, never DeepSpeed.
    "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    # Elements that one bucket of gradients holds. DeepSpeed's own 5e8 are 2 GB of fp32, which ZeRO 3 always holds.
    "zero_optimization": {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
}
_SECTIONS = {key.rpartition(".")[0] for key in OWNED if "." in key}
_OFFLOAD_DEVICE = "zero_optimization.offload_optimizer.device"
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
        if value != {}:  # which would empty a section that the typed keys have filled
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
        elif key in _SECTIONS and value != {}:
            yield Problem(f"deepspeed.{key}", f"is {value!r}, not a mapping", "remove it, or write keys below it")
        elif (harm := _harm(path, value)) is not None:
            problem, typed = harm
            remedy = f"remove it and use {typed}" if typed else "remove it"
            yield Problem(f"deepspeed.{key}", f"is {value!r}, which {problem}", remedy)
        elif key == _OFFLOAD_DEVICE and value != (device := "cpu" if config.parallel.offload_optimizer else "none"):
            problem = f"is {value!r}, but parallel.offload_optimizer makes it {device!r}"
            yield Problem(f"deepspeed.{key}", problem, "remove the raw key and set parallel.offload_optimizer")
        elif key in OWNED and OWNED[key][1](config) != value:
            typed, owned = OWNED[key]
            yield Problem(
                f"deepspeed.{key}",
                f"is {value!r}, but {typed} makes it {owned(config)!r}",
                f"remove the raw key and set {typed}",
            )


def _harm(path: tuple[str, ...], value: Any) -> tuple[str, str] | None:
    """Return what a raw key would do to the run and the typed key for it; None if it does no harm."""
    for size in range(1, len(path) + 1):
        if (entry := HARMFUL.get(".".join(path[:size]))) is not None:
            harmless, problem, typed = entry
            is_harmless = harmless is not None and size == len(path) and value == harmless
            return None if is_harmless else (problem, typed)
    return None


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
