"""Export a run to a checkpoint of the published code, which its scripts load with every key in its place.

What the published model cannot express is refused. Optimizer state is not exported: the published code saves none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState, damaged_checkpoint, read_state
from megachiar.checkpoint.reading import read_weights
from megachiar.config import ModelConfig, RunConfig, load_config
from megachiar.config.section import Section
from megachiar.data.storage.manifest import TokenizerRecord
from megachiar.data.tokenizers.recorded import read_kept_record
from megachiar.errors import UserError
from megachiar.interop.published_file import write_published
from megachiar.interop.published_model import PUBLISHED_DCT
from megachiar.interop.published_names import EMBEDDING, FILTER, parameter_names, prefix_of, table_names, tied_head
from megachiar.interop.published_rotary import published_tables
from megachiar.model import build_model

PUBLISHED_NORM_EPSILON = 1e-5
_DECIDED = frozenset(
    {
        *("kind", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size"),
        *("max_sequence_length", "dropout", "norm", "norm_epsilon", "initializer_std"),
        *("dct.gain", "dct.entropy_dc_weight", "dct.entropy_epsilon", "attention.keys", "attention.rope_base"),
        *("router.kind", "router.operators", "router.tau", "router.tau_low", "router.tau_high"),
        *("router.attention_share", "router.rbf_share", "router.seed", "router.hard_gradient"),
        *("router.collapse_weight", "router.collapse_temperature", "rbf.features", "rbf.gamma"),
        *("meta_router.pool", "meta_router.init"),
    }
)
"""The keys of ``model`` of which this module decides. Any other one has to have its default."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        file: that was written.
        step: of the checkpoint.
        cfg: the published settings in the file.
        perplexity: on the run's validation set, as the file has it; None where there is none or more than one.
        notes: what differs from the run, and what may be missed in the file, as sentences.
    """

    file: str
    step: int
    cfg: dict[str, Any]
    perplexity: float | None
    notes: list[str]


def export_published(checkpoint: Path, path: Path, vocab_size: int | None = None) -> tuple[ExportReport, bool]:
    """Write the published code's form of a verified ``checkpoint`` to ``path``.

    Args:
        checkpoint: of a run in any layout.
        path: of the file.
        vocab_size: rows of the embedding that are exported; None exports all.

    Returns:
        The report, and whether anything was written: a file with the same content stays as it is.

    Raises:
        UserError: the published code has no such model, or the disk refuses the file.
    """
    config, state = load_config(checkpoint / CONFIG_FILE), read_state(checkpoint)
    problems = list(_inexpressible(config))
    if problems:
        listed = "; ".join(problems)
        raise UserError(checkpoint, f"the published code has no such model: {listed}", _REMEDY)
    weights = _read_checked(checkpoint, config)
    known = read_kept_record(checkpoint.parent.parent)
    if vocab_size is not None:
        _check_vocab_size(vocab_size, config.model.vocab_size, known)
        weights["embedding.weight"] = weights["embedding.weight"][:vocab_size].clone()
    rows = len(weights["embedding.weight"])
    cfg, perplexity = published_settings(config.model, rows), _perplexity(config, state)
    content = {"step": state.step, "model": _published_tensors(checkpoint, config, weights), "cfg": cfg}
    written = write_published(path, content | ({} if perplexity is None else {"val_ppl": perplexity}))
    notes = list(_notes(config, state, rows, known))
    return ExportReport(str(path), state.step, cfg, perplexity, notes), written


def _check_vocab_size(wanted: int, rows: int, known: TokenizerRecord | None) -> None:
    """Check that the embedding has as many rows as are wanted, and that the tokenizer needs no more.

    Raises:
        UserError: it does not.
    """
    if wanted > rows:
        raise UserError(f"--vocab-size {wanted}", f"the embedding has {rows:,} rows", f"give at most {rows}")
    if known is not None and wanted < known.vocab_size:
        problem = f"the run's tokenizer has {known.vocab_size:,} ids"
        raise UserError(f"--vocab-size {wanted}", problem, f"give at least {known.vocab_size}")


def _notes(config: RunConfig, state: CheckpointState, rows: int, known: TokenizerRecord | None) -> Iterator[str]:
    model = config.model
    if known is not None and known.vocab_size < rows:
        yield (
            f"the tokenizer has {known.vocab_size:,} of {rows:,} ids; scripts that set vocab_size to the tokenizer's "
            f"need --vocab-size {known.vocab_size}"
        )
    if model.kind == "chiar" and model.dct.gain != PUBLISHED_DCT["gain"]:
        yield f"model.dct.gain is {model.dct.gain:g}: the filters {FILTER} have its ratio to the published gain in them"
    if others := [task.name for task in config.tasks[1:] if task.head is not None]:
        yield f"left out: the classification heads of {', '.join(others)}, which the published model does not have"
    if len(state.validation) > 1 and config.tasks[0].head is None:
        yield f"no val_ppl: the checkpoint has losses on {', '.join(state.validation)}"


_REMEDY = "export a run that was trained with the published settings (docs/published-weights.md lists them)"


def published_settings(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Return what the published code's config needs for ``model``, by its names."""
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": model.hidden_size,
        "n_heads": model.num_attention_heads,
        "n_layers": model.num_layers,
        "max_seq_len": model.max_sequence_length,
        "dropout": model.dropout,
        "rope_base": model.attention.rope_base,
    }
    if model.kind == "baseline":
        return settings
    settings |= {"layer_variant": "dct_attn", "routing_mode": model.router.kind, "use_collapse_reg": False}
    settings |= {"use_meta_router": model.meta_router.pool == "batch"}
    if model.router.kind == "threshold":
        tau = _one_tau(model)
        settings |= {"tau_low": tau, "tau_high": tau}  # the published threshold is their middle
    return settings


def _inexpressible(config: RunConfig) -> Iterator[str]:
    """Yield what the published model does not have, each as key and value with what it has instead."""
    model, router = config.model, config.model.router
    yield from _unknown_settings(model, "model", _DECIDED)
    if model.norm != "post":
        yield f"model.norm is {model.norm} (it has post)"
    if model.norm_epsilon != PUBLISHED_NORM_EPSILON:
        yield f"model.norm_epsilon is {model.norm_epsilon} (it has {PUBLISHED_NORM_EPSILON})"
    if model.ffn_size != 4 * model.hidden_size:
        yield f"model.ffn_hidden_size is {model.ffn_size} (it has {4 * model.hidden_size}, 4 times the hidden size)"
    if config.document_end is not None:
        yield "data.document_mask is true (its tokens attend to all documents of a sample)"
    head = config.tasks[0].head
    if head is not None and head.kind != "mlp":
        yield f"task.head is {head.kind} (it has mlp)"
    if head is not None and head.padding != "counted":
        yield f"task.padding is {head.padding} (it has counted)"
    if model.kind == "baseline":
        return
    if model.meta_router.pool == "causal":
        yield "model.meta_router.pool is causal (it has batch or none)"
    if not model.routed_layers:
        return
    if router.kind not in ("threshold", "soft", "hard"):
        yield f"model.router.kind is {router.kind} (it has threshold, soft and hard)"
    if len(router.operators) != 2:
        yield f"model.router.operators are {list(router.operators)} (it has dct and attention)"
    elif router.kind == "threshold" and _one_tau(model) is None:
        yield "model.router.tau has several values (it has one for all layers)"
    if model.attention.keys != "all":
        yield f"model.attention.keys is {model.attention.keys} (it has all)"
    for key in ("entropy_dc_weight", "entropy_epsilon"):
        if (value := getattr(model.dct, key)) != PUBLISHED_DCT[key]:
            yield f"model.dct.{key} is {value} (it has {PUBLISHED_DCT[key]:g}, and other routes)"


def _unknown_settings(section: Section, name: str, decided: Collection[str]) -> Iterator[str]:
    """Yield each key of a section, ``name``, that is not ``decided`` and has another value than its default."""
    for key, field in type(section).model_fields.items():
        value, at = getattr(section, key), f"{name}.{key}"
        if isinstance(value, Section):
            yield from _unknown_settings(value, at, decided)
        elif at.removeprefix("model.") not in decided and value != field.get_default(call_default_factory=True):
            yield f"{at} is {value} (it has no such setting)"


def _one_tau(model: ModelConfig) -> float | None:
    """Return the threshold of all routed layers; None where they have several."""
    tau = model.router.tau
    values = set(tau) if isinstance(tau, tuple) else {tau}
    return values.pop() if len(values) == 1 else None


def _read_checked(checkpoint: Path, config: RunConfig) -> dict[str, torch.Tensor]:
    """Return the parameters of a checkpoint by name.

    Raises:
        UserError: they are not those of the model of ``config``.
    """
    weights = read_weights(checkpoint)
    model = build_model(config.model, seed=0, device="meta", heads=config.heads)
    if {name: t.shape for name, t in weights.items()} != {name: p.shape for name, p in model.named_parameters()}:
        raise damaged_checkpoint(checkpoint, f"{CONFIG_FILE} has another model than the weights")
    return weights


def _published_tensors(
    checkpoint: Path, config: RunConfig, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the published state dict: parameters, the tied head and rotary tables."""
    model, tensors = config.model, {}
    for published, ours in parameter_names(config).items():
        parts = [weights[name] for name in ours]
        tensors[published] = torch.cat(parts) if len(parts) > 1 else parts[0]
        if published.endswith(f".{FILTER}"):
            tensors[published] = _with_published_gain(checkpoint, published, tensors[published], model.dct.gain)
    if (head := tied_head(config)) is not None:
        tensors[head] = tensors[f"{prefix_of(config)}{EMBEDDING}"]
    tables = published_tables(model.head_size, model.max_sequence_length, model.attention.rope_base)
    for names in table_names(config):
        tensors |= dict(zip(names, tables, strict=True))
    return tensors


def _with_published_gain(checkpoint: Path, name: str, filters: torch.Tensor, gain: float) -> torch.Tensor:
    """Return the filter (d,) that gives the same DCT mixing with the published gain.

    Raises:
        UserError: fp32 numbers cannot hold it exactly.
    """
    exact = filters.double() * (gain / PUBLISHED_DCT["gain"])
    folded = exact.to(torch.float32)
    if not torch.equal(folded.double(), exact):
        raise UserError(
            checkpoint,
            f"model.dct.gain is {gain}, and {name} cannot take its ratio to the published {PUBLISHED_DCT['gain']:g} "
            "without rounding",
            "export a run whose gain is a power of two",
        )
    return folded


def _perplexity(config: RunConfig, state: CheckpointState) -> float | None:
    """Return the perplexity on the one validation set of a language model's checkpoint."""
    losses = list(state.validation.values())
    return math.exp(min(losses[0], 700.0)) if len(losses) == 1 and config.tasks[0].head is None else None
