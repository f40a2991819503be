"""Tell from a published checkpoint which model it holds, and turn its tensors into our parameters.

The published code saves few settings or none. Sizes follow from the shapes of the tensors; heads, longest sequence and
the base of the rotary embedding from the rotary tables. The threshold is nowhere in the file, unless somebody has added
it to ``cfg``: the published code takes it from its config's class.

Shapes: V = vocabulary, d = channels, c = channels of a head, T = longest sequence, L = layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megachiar.config import RunConfig
from megachiar.errors import UserError
from megachiar.interop.published_file import PublishedFile
from megachiar.interop.published_names import (
    CLASSIFIER,
    EMBEDDING,
    GATE,
    META_GATE,
    MIXED_HEAD,
    parameter_names,
    table_names,
    tied_head,
)
from megachiar.interop.published_rotary import RotaryTables, read_rotary
from megachiar.model import build_model

PUBLISHED_DCT = {"gain": 2.0, "entropy_dc_weight": 2.0, "entropy_epsilon": 1e-8}
"""The published code's DCT and spectral entropy, as keys of ``model.dct``."""
PUBLISHED_DROPOUT = 0.1
_LAYER = re.compile(r"(?:backbone\.)?(layers|attns)\.(\d{1,9})\.")
_WHOLE = "give the whole file, as a training script of the published code wrote it"
_TOLD = 4  # names that a message lists


@dataclass(frozen=True)
class ImportOptions:
    """What is asked of an import, for what a file may not say.

    Attributes:
        tau: the threshold on H; None where the file has it, or needs none.
        router: the kind of a learned router; None where the file says it.
        heads: heads of each attention layer; None where rotary tables say it.
        sequence_length: longest sequence in tokens; None where rotary tables say it.
        vocab_size: rows of the embedding with padding; None for those of the file.
    """

    tau: float | None = None
    router: Literal["soft", "hard"] | None = None
    heads: int | None = None
    sequence_length: int | None = None
    vocab_size: int | None = None


def describe_model(file: PublishedFile, options: ImportOptions) -> dict[str, Any]:
    """Return the section ``model`` of a config for the model of ``file``.

    A threshold that nothing names is None: ``missing_tau`` is the message for that.

    Raises:
        UserError: the file holds no model of the published code, or does not say what it needs to say, or contradicts
            itself or the options.
    """
    kind = _find_kind(file)
    vocabulary, d = _shape_of_embedding(file)
    layers = _count_layers(file, kind)
    rotary = read_rotary(file)
    _compare_settings(file, {"vocab_size": vocabulary, "d_model": d, "n_layers": layers})
    if options.vocab_size is not None and options.vocab_size < vocabulary:
        problem = f"is below the {vocabulary:,} rows of the embedding in {file.path}"
        raise UserError(f"--vocab-size {options.vocab_size}", problem, f"give at least {vocabulary}, or leave it out")
    dropout = file.setting("dropout", float, int)
    gate = "batch" if f"{file.prefix}{META_GATE}" in file.tensors else "none"
    router = _find_router(file, options, layers) if kind == "chiar" else _refuse_router_options(options)
    base = rotary.base if rotary is not None else file.setting("rope_base", float, int)
    return {
        "kind": kind,
        "num_layers": layers,
        "hidden_size": d,
        "num_attention_heads": _find_heads(file, options, rotary, d),
        "vocab_size": options.vocab_size or vocabulary,
        "max_sequence_length": _find_length(file, options, rotary),
        "dropout": PUBLISHED_DROPOUT if dropout is None else float(dropout),
        "dct": PUBLISHED_DCT,
        "router": router,
        "attention": {} if base is None else {"rope_base": float(base)},
        "meta_router": {"pool": gate, "init": "published"} if kind == "chiar" else {},
    }


def describe_task(file: PublishedFile) -> dict[str, Any]:
    """Return the section ``task`` of a config for the model of ``file``; empty for a language model.

    Raises:
        UserError: the head of a classifier has no shape of one.
    """
    if not any(name.startswith(CLASSIFIER) for name in file.tensors):
        return {}
    name = f"{CLASSIFIER}3.weight"
    weight = file.tensors.get(name)
    if weight is None or weight.dim() != 2:
        raise UserError(file.path, f"is a classifier without {name}, a matrix with a row for each class", _WHOLE)
    return {"kind": "classification", "classes": len(weight), "head": "mlp", "padding": "counted"}


def convert(file: PublishedFile, config: RunConfig) -> dict[str, torch.Tensor]:
    """Return the parameters of ``file`` by our names, fp32.

    Args:
        file: the checkpoint.
        config: of the run, with what ``describe_model`` and ``describe_task`` have found in it.

    Raises:
        UserError: a tensor is missing, belongs to no part of the model, has another shape, or is not finite; or the
            head is not tied to the embedding.
    """
    rows = len(file.tensors[f"{file.prefix}{EMBEDDING}"])
    _check_tensors(file, config, rows)
    weights: dict[str, torch.Tensor] = {}
    for published, ours in parameter_names(config).items():
        tensor = file.tensors[published].to(torch.float32)
        if not torch.isfinite(tensor).all():
            raise UserError(file.path, f"{published} is not finite", "use an earlier checkpoint of that training")
        third = len(tensor) // 3
        parts = (tensor,) if len(ours) == 1 else tensor.split([third, len(tensor) - third])
        weights |= dict(zip(ours, parts, strict=True))
    if config.model.vocab_size > rows:
        embedding = weights["embedding.weight"]
        padding = embedding.new_zeros(config.model.vocab_size - rows, config.model.hidden_size)
        weights["embedding.weight"] = torch.cat([embedding, padding])
    return weights


def left_out(file: PublishedFile) -> list[str]:
    """Return the names of the tensors that are not imported though they hold trained weights."""
    return sorted(name for name in file.tensors if name.startswith(MIXED_HEAD))


def missing_tau(file: PublishedFile, hidden_size: int) -> UserError:
    """Return the error for a threshold router whose threshold nothing says."""
    known = {
        1024: " (the published code has 0.8935 and 0.8973)",
        256: " (the published code has 0.8935 and 0.8973 for all sizes; the paper's 17M model has 0.855 and 0.865)",
    }
    return UserError(
        file.path,
        "does not say the threshold of its router: the published code keeps it in its config alone",
        f"give the one that the model was trained with, --tau TAU or --tau LOW HIGH{known.get(hidden_size, '')}; or "
        "--calibrate PREFIX to have one from a dataset",
    )


def _find_kind(file: PublishedFile) -> Literal["chiar", "baseline"]:
    names = file.tensors.keys()
    layers = {match[1] for name in names if (match := _LAYER.match(name))}
    if f"{file.prefix}{EMBEDDING}" not in names or len(layers) != 1:
        shown = _list_some(names)
        raise UserError(
            file.path,
            f"holds no model of the published code: it has no {EMBEDDING} with layers.* or attns.* but {shown}",
            "give a checkpoint that a training script of the published code has written",
        )
    return "baseline" if layers == {"attns"} else "chiar"


def _shape_of_embedding(file: PublishedFile) -> tuple[int, int]:
    shape = file.tensors[f"{file.prefix}{EMBEDDING}"].shape
    if len(shape) != 2:
        raise UserError(file.path, f"{EMBEDDING} has shape {tuple(shape)}, and no rows of channels", _WHOLE)
    return shape[0], shape[1]


def _count_layers(file: PublishedFile, kind: str) -> int:
    numbers = {int(match[2]) for name in file.tensors if (match := _LAYER.match(name))}
    absent = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if absent < len(numbers):
        name = "attns" if kind == "baseline" else "layers"
        raise UserError(file.path, f"has {name}.{max(numbers)} and no {name}.{absent}", _WHOLE)
    return len(numbers)


def _compare_settings(file: PublishedFile, found: dict[str, int]) -> None:
    """Compare what ``cfg`` says with what the tensors say.

    Raises:
        UserError: they contradict each other.
    """
    for name, value in found.items():
        said = file.setting(name, int)
        if said is not None and said != value:
            problem = f"contradicts itself: cfg has {name} {said}, and the tensors are those of {value}"
            raise UserError(file.path, problem, "give a file whose settings belong to its weights")


def _find_heads(file: PublishedFile, options: ImportOptions, rotary: RotaryTables | None, d: int) -> int:
    said = file.setting("n_heads", int)
    if rotary is None:
        heads = options.heads or said
        if heads is None:
            raise UserError(
                file.path,
                f"does not say how many heads share its {d} channels: it has no rotary tables, and no n_heads in cfg",
                "give --heads",
            )
        return heads
    if d % rotary.head_size:
        problem = f"contradicts itself: its rotary tables are for heads of {rotary.head_size} channels, and d is {d}"
        raise UserError(file.path, problem, _WHOLE)
    heads = d // rotary.head_size
    _compare_settings(file, {"n_heads": heads})
    if options.heads not in (None, heads):
        raise UserError(f"--heads {options.heads}", f"the rotary tables of {file.path} are for {heads}", "leave it out")
    return heads


def _find_length(file: PublishedFile, options: ImportOptions, rotary: RotaryTables | None) -> int:
    """Return the longest sequence; the published code doubles its tables when it reads a longer one."""
    said = file.setting("max_seq_len", int)
    if rotary is None:
        length = options.sequence_length or said
        if length is None:
            problem = "does not say its longest sequence: it has no rotary tables, and no max_seq_len in cfg"
            raise UserError(file.path, problem, "give --sequence-length")
        return length
    if said is not None and said > rotary.length:
        problem = f"contradicts itself: cfg has max_seq_len {said}, and its rotary tables {rotary.length} rows"
        raise UserError(file.path, problem, "give a file whose settings belong to its weights")
    if options.sequence_length is not None and options.sequence_length > rotary.length:
        where, problem = (
            f"--sequence-length {options.sequence_length}",
            f"is above the {rotary.length} rows of the tables",
        )
        raise UserError(where, f"{problem} in {file.path}", f"give at most {rotary.length}, or leave it out")
    return options.sequence_length or rotary.length


def _find_router(file: PublishedFile, options: ImportOptions, layers: int) -> dict[str, Any]:
    """Return the section ``router``; its ``tau`` is None where neither options nor file name one."""
    said = file.setting("routing_mode", str)
    if said not in (None, "threshold", "soft", "hard"):
        raise UserError(file.path, f"cfg has routing_mode {said!r}", "give a file of the published code")
    has_gates = any(name.endswith(f".{GATE}") for name in file.tensors)
    if layers > 2 and said is not None and has_gates != (said != "threshold"):
        problem = (
            f"contradicts itself: cfg has routing_mode {said}, and its routers have {'' if has_gates else 'no '}gates"
        )
        raise UserError(file.path, problem, "give a file whose settings belong to its weights")
    if not has_gates:
        if options.router is not None:
            raise UserError(f"--router {options.router}", f"the routers of {file.path} have no gates", "leave it out")
        low, high = (file.setting(name, float, int) for name in ("tau_low", "tau_high"))
        tau = options.tau
        if tau is None and low is not None and high is not None:
            tau = (low + high) / 2
        if tau is None and layers <= 2:  # no layer routes, and the config wants a number
            tau = 0.5
        return {"kind": "threshold", "tau": tau}
    if options.router is not None and said not in (None, options.router):
        raise UserError(f"--router {options.router}", f"the router of {file.path} is {said}", "leave it out")
    kind = options.router or said
    if kind is None:
        problem = "does not say whether its routers blend the operators by their gates or take the one with the largest"
        raise UserError(file.path, problem, "give --router soft or --router hard, as it was trained")
    if options.tau is not None:
        raise UserError("--tau", f"the routers of {file.path} decide by gates, without a threshold", "leave it out")
    return {"kind": kind}


def _refuse_router_options(options: ImportOptions) -> dict[str, Any]:
    for name, value in (("--tau", options.tau), ("--router", options.router)):
        if value is not None:
            raise UserError(name, "the file holds a baseline, which has no router", "leave it out")
    return {}


def _check_tensors(file: PublishedFile, config: RunConfig, rows: int) -> None:
    """Compare names and shapes of all tensors with those of the model of ``config``, with ``rows`` in its embedding."""
    model, embedding = config.model, f"{file.prefix}{EMBEDDING}"
    shapes = published_shapes(config) | {embedding: (rows, model.hidden_size)}
    tables = {name for layer in table_names(config) for name in layer}
    has_tables = any(name in file.tensors for name in tables)
    needed = [*shapes, *(sorted(tables) if has_tables else [])]
    what = f"a {model.kind} {'classifier' if config.heads else 'model'} of {model.num_layers} layers"
    if absent := [name for name in needed if name not in file.tensors]:
        raise UserError(file.path, f"lacks {len(absent)} tensors of {what}: {_list_some(absent)}", _WHOLE)
    known = {*shapes, *tables, tied_head(config), *left_out(file)}
    if surplus := [name for name in file.tensors if name not in known]:
        problem = f"has {len(surplus)} tensors that {what} of the published code does not have: {_list_some(surplus)}"
        raise UserError(file.path, problem, "give a file that today's published code can load")
    for name, shape in shapes.items():
        found = tuple(file.tensors[name].shape)
        if found != shape:
            expected = f"where {what} with d {model.hidden_size} has {shape}"
            raise UserError(file.path, f"contradicts itself: {name} has shape {found}, {expected}", _WHOLE)
    head = file.tensors.get(tied_head(config) or "")
    if head is not None and not torch.equal(head, file.tensors[embedding]):
        problem = f"{tied_head(config)} is not {embedding}: the head of the published model is tied to its embedding"
        raise UserError(file.path, problem, _WHOLE)


def published_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each published parameter of the model of ``config``, by its published name."""
    model = build_model(config.model, seed=0, device="meta", heads=config.heads)
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {
        name: (sum(ours[part][0] for part in parts), *ours[parts[0]][1:])
        for name, parts in parameter_names(config).items()
    }


def _list_some(names: Iterable[str]) -> str:
    every = sorted(names)
    more = f" and {len(every) - _TOLD} more" if len(every) > _TOLD else ""
    return ", ".join(every[:_TOLD]) + more
