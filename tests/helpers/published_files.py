"""Checkpoints as the published code writes them, with weights whose logits it has computed (``record``, fp64).

``tests/workers/published_code_worker.py`` made the record.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEP, PERPLEXITY, ACCURACY = 700, 30.5, 63.35
LANGUAGE_MODELS = ("threshold", "soft", "hard", "no_gate", "baseline")
CLASSIFIERS = ("classifier", "baseline_classifier")
KINDS = (*LANGUAGE_MODELS, *CLASSIFIERS)
LONG_KINDS = ("threshold", "baseline")
TAU = ("--tau", "0.77", "0.79")


@functools.cache
def record() -> dict[str, Any]:
    """Return what the published code computes in fp64 with ``recorded_weight`` and fp64 rotary tables."""
    return json.loads((Path(__file__).parents[1] / "fixtures" / "published_checkpoints.json").read_text())


def recorded_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return legacy random numbers, which never change, as fp32 weights of a given name."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(generator.standard_normal(shape) * 0.3).float()


@functools.cache
def long_record() -> dict[str, Any]:
    """Return what the published code computes in fp64 with ``long_weight``, for sequences of 256 tokens."""
    return json.loads((Path(__file__).parents[1] / "fixtures" / "published_long_sequences.json").read_text())


def long_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return fp32 weights of a given name with deviation 0.1, around 1 where the model starts with ones."""
    starts_with_ones = len(shape) == 1 and not name.endswith("bias")
    return recorded_weight(name, shape) / 3 + float(starts_with_ones)


def long_content(kind: str) -> dict[str, Any]:
    """Return a checkpoint of ``long_weight`` without rotary tables: ``cfg`` has the sizes."""
    weights = {name: long_weight(name, tuple(shape)) for name, shape in long_record()["models"][kind]["shapes"].items()}
    weights["lm_head.weight"] = weights["token_emb.weight"]
    mode = {} if kind == "baseline" else {"routing_mode": kind}
    return {"step": STEP, "model": weights, "val_ppl": PERPLEXITY, "cfg": long_record()["sizes"] | mode}


def published_tensors(kind: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a published model: weights, rotary tables, and the tied head if it has one."""
    model = record()["models"][kind]
    tensors = {name: recorded_weight(name, tuple(shape)) for name, shape in model["shapes"].items()}
    tables = dict(zip(("inv_freq", "cos_cache", "sin_cache"), map(torch.tensor, record()["tables"]), strict=True))
    tensors |= {name: tables[name.rpartition(".")[2]].clone() for name in model["buffers"]}
    if kind == "baseline_classifier":
        return tensors
    prefix = "backbone." if kind == "classifier" else ""
    return tensors | {f"{prefix}lm_head.weight": tensors[f"{prefix}token_emb.weight"]}


def published_settings(kind: str) -> dict[str, Any]:
    """Return ``cfg`` as the training script saves it: what it has set itself."""
    settings: dict[str, Any] = {"vocab_size": record()["sizes"]["vocab_size"]}
    if kind.startswith("baseline"):
        return settings
    mode = kind if kind in ("soft", "hard") else "threshold"
    return settings | {"routing_mode": mode, "use_collapse_reg": False, "layer_variant": "dct_attn"}


def published_content(kind: str) -> dict[str, Any]:
    """Return what the training script saves."""
    content = {"step": STEP, "model": published_tensors(kind)}
    if kind in CLASSIFIERS:
        return content | {"test_acc": ACCURACY}
    content["val_ppl"] = PERPLEXITY
    return content | {"cfg": published_settings(kind)}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def options_of(kind: str) -> tuple[str, ...]:
    """Return the options that an import of this kind needs."""
    return TAU if kind in ("threshold", "no_gate", "classifier") else ()


def published_logits(kind: str) -> torch.Tensor:
    """Return the recorded logits, fp64: (B, T, V), or (B, C) of a classifier."""
    return torch.tensor(record()["models"][kind]["logits"], dtype=torch.float64)
