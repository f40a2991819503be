"""The published code's names for our parameters, and the tensors that it keeps beside its parameters.

A published tensor holds one of our parameters, or two whose rows lie one after the other in it: ``attn.qkv`` has
queries first, then keys and values. What the published code keeps in its rotary tables and its tied head follows from
the parameters and the config, so that we keep neither.
"""

from __future__ import annotations

from collections.abc import Iterator

from megachiar.config import RunConfig
from megachiar.config.model import ModelConfig
from megachiar.config.tasks import MAIN_TASK

BACKBONE = "backbone."
"""The beginning of the names of a CHIAR classifier's layers; those of other models have none."""
CLASSIFIER = "classifier."
"""The beginning of the names of a classifier's head, a hidden layer (0) and a linear one (3)."""
EMBEDDING, TIED_HEAD = "token_emb.weight", "lm_head.weight"
FILTER = "dct_mix.w"
GATE = "router.gate_proj.weight"
META_GATE = "meta_router.gate_proj.weight"
MIXED_HEAD = "_cls_head_"
"""The beginning of the names of the heads that mixed training has for classification."""
FREQUENCIES, COSINES, SINES = "rope.inv_freq", "rope.cos_cache", "rope.sin_cache"

Names = dict[str, tuple[str, ...]]
"""Published name -> the names of our parameters that it holds, in the order of its rows."""


def parameter_names(config: RunConfig) -> Names:
    """Return the published names of the parameters of a run's model; heads of a mixed run have none."""
    names = _names_of_layers(config.model)
    if config.tasks[0].head is None:
        return names
    names = {f"{prefix_of(config)}{name}": ours for name, ours in names.items()}
    head = f"classifiers.{MAIN_TASK}"
    return names | _affine(f"{CLASSIFIER}0", f"{head}.hidden") | _affine(f"{CLASSIFIER}3", f"{head}.output")


def prefix_of(config: RunConfig) -> str:
    """Return what stands before the published names of embedding and layers."""
    return BACKBONE if config.model.kind == "chiar" and config.tasks[0].head is not None else ""


def tied_head(config: RunConfig) -> str | None:
    """Return the published name of the head that is tied to the embedding; a classifying baseline has none."""
    if config.model.kind == "baseline" and config.tasks[0].head is not None:
        return None
    return f"{prefix_of(config)}{TIED_HEAD}"


def _names_of_layers(model: ModelConfig) -> Names:
    names = {EMBEDDING: ("embedding.weight",), **_affine("norm", "norm")}
    if model.kind == "chiar" and model.meta_router.pool != "none":
        names |= _affine("meta_router.gate_proj", "layers.0.meta_router.gate")
    for index in range(model.num_layers):
        names |= _baseline_layer(index) if model.kind == "baseline" else _layer(model, index)
    return names


def table_names(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield for each attention layer the names of its rotary tables: frequencies, cosines and sines."""
    model, prefix = config.model, prefix_of(config)
    layers = range(model.num_layers) if model.kind == "baseline" else range(1, model.num_layers)
    for index in layers:
        attention = f"attns.{index}" if model.kind == "baseline" else f"{prefix}layers.{index}.attn"
        yield f"{attention}.{FREQUENCIES}", f"{attention}.{COSINES}", f"{attention}.{SINES}"


def _layer(model: ModelConfig, index: int) -> Names:
    at, is_routed = f"layers.{index}", index in model.routed_layers
    names = _feed_forward(f"{at}.ffn.0", f"{at}.ffn.3", f"{at}.ffn_norm", f"{at}.feed_forward")
    if index < model.num_layers - 1:
        ours = f"{at}.dct" if is_routed else f"{at}.operator"
        names |= {f"{at}.{FILTER}": (f"{ours}.filter",), **_affine(f"{at}.dct_mix.norm", f"{ours}.norm")}
    if index > 0:
        names |= _attention(f"{at}.attn", f"{at}.attention" if is_routed else f"{at}.operator")
    if is_routed and model.router.kind != "threshold":
        names |= _affine(f"{at}.router.gate_proj", f"{at}.router.gate")
    return names


def _baseline_layer(index: int) -> Names:
    at = f"layers.{index}"
    names = _feed_forward(f"ffns.{index}.0", f"ffns.{index}.3", f"ffn_norms.{index}", f"{at}.feed_forward")
    return names | _attention(f"attns.{index}", f"{at}.operator")


def _attention(published: str, ours: str) -> Names:
    return {
        **_affine(f"{published}.qkv", f"{ours}.query", f"{ours}.key_value"),
        **_affine(f"{published}.out_proj", f"{ours}.output"),
        **_affine(f"{published}.norm", f"{ours}.norm"),
    }


def _feed_forward(up: str, down: str, norm: str, ours: str) -> Names:
    return {**_affine(up, f"{ours}.up"), **_affine(down, f"{ours}.down"), **_affine(norm, f"{ours}.norm")}


def _affine(published: str, *ours: str) -> Names:
    """Return the names of the weight and the bias of a linear layer or a norm."""
    return {f"{published}.{part}": tuple(f"{name}.{part}" for name in ours) for part in ("weight", "bias")}
