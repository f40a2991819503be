"""Write the model card of an export, ``README.md``: what the model is, what it was trained on, and how well it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megachiar import __version__
from megachiar.checkpoint.format import CheckpointState
from megachiar.config import RunConfig
from megachiar.config.tasks import RunTask
from megachiar.errors import UserError
from megachiar.training.run_result import RunResult, read_result

DEFAULT_LICENSE = "unknown"
_LARGEST = 700.0  # nats, whose exponential is a number
_PAPER = "[Chiaroscuro Attention: Spending Compute in the Dark](https://arxiv.org/abs/2606.08327)"


def result_of(checkpoint: Path, state: CheckpointState) -> RunResult | None:
    """Return the result of the run, if it was measured with the weights of this checkpoint; else None."""
    try:
        result = read_result(checkpoint.parent.parent)
    except UserError:
        return None
    return result if result is not None and result.best.step == state.step else None


def describe_model_card(
    config: RunConfig,
    task: RunTask,
    state: CheckpointState,
    *,
    name: str,
    parameters: int,
    license_name: str,
    result: RunResult | None,
    notes: Sequence[str],
) -> str:
    """Return the text of the card.

    Args:
        config: of the run.
        task: that is exported.
        state: of the checkpoint.
        name: of the folder of the export.
        parameters: numbers that were trained.
        license_name: for the field ``license``.
        result: of the run on its test sets; None where there is none.
        notes: sentences on what differs from the run.
    """
    model = config.model
    is_classifier = task.head is not None
    what = "CHIAR-Former" if model.kind == "chiar" else "attention-only baseline of CHIAR-Former"
    kind = "classifier" if is_classifier else "language model"
    lines = [
        "---",
        "library_name: transformers",
        f"license: {license_name}",
        f"pipeline_tag: {'text-classification' if is_classifier else 'text-generation'}",
        "tags: [chiar-former, megachiar]",
        "---",
        "",
        f"# {name}",
        "",
        f"A {kind} of {parameters:,} parameters, a {what} ({_PAPER}). It was trained for {state.step:,} steps and "
        f"exported by megachiar {__version__}.",
        "",
        "## Use",
        "",
        "```python",
        *_usage(name, is_classifier),
        "```",
        "",
        "The model's code is `modeling_chiar.py` in this folder; it needs torch and transformers alone.",
        "",
        *_section("Model", _model_rows(config)),
        *_section("Training data", _data_rows(config, state)),
        *_section("Results", _result_rows(task, state, result)),
    ]
    if notes:
        lines += ["## Notes", "", *(f"* {note[0].upper()}{note[1:]}." for note in notes), ""]
    return "\n".join(lines)


def _usage(name: str, is_classifier: bool) -> list[str]:
    kind = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    lines = [
        f"from transformers import AutoTokenizer, {kind}",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
        f'model = {kind}.from_pretrained("{name}", trust_remote_code=True)',
    ]
    if is_classifier:
        return [*lines, 'logits = model(**tokenizer("a text", return_tensors="pt")).logits']
    return [
        *lines,
        'inputs = tokenizer("Once upon", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
    ]


def _section(title: str, rows: Iterator[tuple[str, Any]]) -> list[str]:
    """Return a table of names and values under a title."""
    body = [f"| {name} | {value} |" for name, value in rows]
    return [f"## {title}", "", "| | |", "|---|---|", *body, ""]


def _model_rows(config: RunConfig) -> Iterator[tuple[str, Any]]:
    model = config.model
    yield "layers", model.num_layers
    yield "hidden size", model.hidden_size
    yield "attention heads", model.num_attention_heads
    yield "feed-forward size", model.ffn_size
    yield "vocabulary", f"{model.vocab_size:,}"
    yield "longest sequence", f"{model.max_sequence_length:,} tokens"
    yield "norm", model.norm
    if model.routed_layers:
        yield "router", f"{model.router.kind}: {', '.join(model.router.operators)}"
        yield "keys of attention", model.attention.keys
    yield "trained in", config.precision.compute


def _data_rows(config: RunConfig, state: CheckpointState) -> Iterator[tuple[str, Any]]:
    for source in state.data.sources:
        size = f"{source.tokens:,} tokens" if source.examples is None else f"{source.examples:,} examples"
        yield Path(source.path).name, size
    yield "sequences read", f"{state.samples:,} of {config.sequence_length:,} tokens"


def _result_rows(task: RunTask, state: CheckpointState, result: RunResult | None) -> Iterator[tuple[str, Any]]:
    for name, loss in state.validation.items():
        is_text = task.head is None
        perplexity = f", perplexity {math.exp(min(loss, _LARGEST)):.2f}" if is_text else ""
        yield f"validation, {name}", f"loss {loss:.4f}{perplexity}"
    for name, measures in (result.test if result is not None else {}).items():
        numbers = {key: value for key, value in measures.items() if isinstance(value, float)}
        yield f"test, {name}", ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in numbers.items())
