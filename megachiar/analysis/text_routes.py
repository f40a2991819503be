"""Describe the routes of a text: each token with its text, class, entropies and operators, and shares over all of them.

JSON, terminal, page and demo all show what this module returns.

Shapes: L = layers, n = tokens of the text, O = operators of the config.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from megachiar.analysis.calibration import describe_noise, noise_entropies
from megachiar.analysis.route_trace import RouteTrace, trace_routes
from megachiar.analysis.token_texts import CLASSES, token_classes
from megachiar.config import ModelConfig
from megachiar.data.tokenizers.token_reader import TokenText, token_texts
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.kernels.ignored_target import IGNORED_TARGET
from megachiar.kernels.spectral import white_noise_entropy
from megachiar.model import ChiarFormer
from megachiar.planning.flops import forward_flops_of_attention, forward_flops_of_shares


class Window(NamedTuple):
    """A stretch of a text that the model reads in one pass.

    Attributes:
        start: first token that it reads.
        kept: first token whose routes are taken from this pass.
        stop: one past the last token.
    """

    start: int
    kept: int
    stop: int


@dataclass(frozen=True)
class TextRoutes:
    """The routes of a text.

    Attributes:
        tokens: (n,) ids.
        texts: what each token stands for.
        classes: the class of each token.
        windows: the passes in which the text was read, in order.
        trace: routes of all tokens, with B = 1 and T = n, on the CPU.
        losses: (n,) fp64, loss in nats of each token given those before it in its window; nan where there are none.
        prompt_tokens: how many of the tokens were given; the others were generated.
    """

    tokens: tuple[int, ...]
    texts: tuple[TokenText, ...]
    classes: tuple[str, ...]
    windows: tuple[Window, ...]
    trace: RouteTrace
    losses: np.ndarray
    prompt_tokens: int

    def as_dict(self, config: ModelConfig) -> dict[str, Any]:
        """Return the record that ``--json`` prints and that pages show; ``config`` is that of the model."""
        return {
            "operators": list(self.trace.operators),
            "router": config.router.kind if config.routed_layers else None,
            "max_sequence_length": config.max_sequence_length,
            "prompt_tokens": self.prompt_tokens,
            "windows": [window._asdict() for window in self.windows],
            "noise": noise_of(config),
            "layers": describe_layers(self),
            "classes": describe_classes(self),
            "flops_saved": flops_saved(self, config),
            "mean_loss": float(np.nanmean(self.losses)) if np.isfinite(self.losses).any() else None,
            "meta_gate_mean": None if self.trace.meta_gate is None else self.trace.meta_gate.double().mean().item(),
            "tokens": list(describe_tokens(self)),
        }


def text_routes(
    model: ChiarFormer, tokenizer: Tokenizer, tokens: Sequence[int], prompt_tokens: int | None = None
) -> TextRoutes:
    """Run ``model`` over the tokens of a text, at least one, and return their routes.

    A text that is longer than the model's ``max_sequence_length`` is read in windows, see ``windows_of``.

    Args:
        model: a whole model on one rank, in evaluation mode.
        tokenizer: that made the tokens.
        tokens: ids of the text.
        prompt_tokens: how many of them were given; None for all.
    """
    windows = windows_of(len(tokens), model.config.max_sequence_length)
    parts, losses = [], np.full(len(tokens), np.nan)
    for start, kept, stop in windows:
        ids = torch.tensor([list(tokens[start:stop])])
        targets = torch.cat([ids[:, 1:], torch.full((1, 1), IGNORED_TARGET)], 1)
        trace = on_cpu(trace_routes(model, ids, targets))
        assert trace.token_losses is not None
        first = max(kept, start + 1)  # the first token of a pass follows nothing
        losses[first:stop] = trace.token_losses[0, first - start - 1 : stop - start - 1].double()
        parts.append(trace.tokens(slice(kept - start, stop - start)))
    return describe_text(tokenizer, tokens, windows, joined(parts), losses, prompt_tokens)


def describe_text(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    windows: Sequence[Window],
    trace: RouteTrace,
    losses: np.ndarray,
    prompt_tokens: int | None = None,
) -> TextRoutes:
    """Return the routes of a text whose passes were traced already; the arguments are attributes of ``TextRoutes``."""
    texts = token_texts(tokenizer, tokens)
    return TextRoutes(
        tokens=tuple(tokens),
        texts=tuple(texts),
        classes=tuple(token_classes(texts)),
        windows=tuple(windows),
        trace=trace,
        losses=losses,
        prompt_tokens=len(tokens) if prompt_tokens is None else prompt_tokens,
    )


def windows_of(tokens: int, longest: int) -> list[Window]:
    """Return the windows in which a text is read by a model that takes ``longest`` tokens.

    Each window after the first begins with the half before it, so that every token has that much before it::

        longest 4, a text of 9    | 0 1 2 3 |                   kept: 0 1 2 3
                                      | 2 3 4 5 |               kept: 4 5
                                          | 4 5 6 7 |           kept: 6 7
                                              | 6 7 8 |         kept: 8
    """
    step = max(1, longest // 2)
    windows = [Window(0, 0, min(tokens, longest))]
    while windows[-1].stop < tokens:
        kept = windows[-1].stop
        windows.append(Window(kept - (longest - step), kept, min(tokens, kept + step)))
    return windows


def on_cpu(trace: RouteTrace) -> RouteTrace:
    """Return ``trace`` on the CPU."""
    return _each_tensor([trace], lambda tensors: tensors[0].cpu())


def joined(traces: Sequence[RouteTrace]) -> RouteTrace:
    """Return traces of consecutive tokens of one sequence as one."""
    return _each_tensor(traces, lambda tensors: torch.cat(list(tensors), -1))


def _each_tensor(traces: Sequence[RouteTrace], function: Any) -> RouteTrace:
    """Return a trace whose tensors are those of ``traces`` after ``function``, with the tokens as their last axis."""
    values: dict[str, Any] = {}
    for field in fields(RouteTrace):
        each = [getattr(trace, field.name) for trace in traces]
        if all(isinstance(value, torch.Tensor) for value in each):
            is_gates = field.name == "gates"  # (L, B, T, O)
            moved = function([tensor.movedim(-2, -1) if is_gates else tensor for tensor in each])
            values[field.name] = moved.movedim(-1, -2) if is_gates else moved
        elif field.name != "token_losses":  # passes that draw tokens have none
            values[field.name] = each[0]
        else:
            values[field.name] = None
    return RouteTrace(**values)


def operator_shares(trace: RouteTrace, chosen: np.ndarray | None = None) -> np.ndarray:
    """Return the share (L, O) of tokens that took each operator; with a soft router the mean of its gates.

    Args:
        trace: of one sequence.
        chosen: bool (n,), the tokens that count; None for all.
    """
    operators = np.arange(len(trace.operators))
    used = (trace.operator[:, 0].numpy()[..., None] == operators).astype(np.float64)  # (L, n, O)
    if trace.is_soft:
        gates = trace.gates[:, 0].double().numpy() if trace.gates is not None else used
        used = np.where(np.isnan(gates), used, gates)
    return used[:, chosen if chosen is not None else slice(None)].mean(1)


def describe_layers(routes: TextRoutes) -> list[dict[str, Any]]:
    """Return a record for each layer: whether it routes, its bounds, the shares of its operators, and its entropies."""
    shares, entropy = operator_shares(routes.trace), routes.trace.entropy[:, 0].double().numpy()
    return [
        {
            "layer": index + 1,
            "routed": routed,
            "bounds": list(routes.trace.bounds[index]),
            "shares": _named(routes.trace.operators, shares[index]),
            "entropy_mean": _number(entropy[index].mean()),
            "entropy_deviation": _number(entropy[index].std()),
        }
        for index, routed in enumerate(routes.trace.routed)
    ]


def describe_classes(routes: TextRoutes) -> list[dict[str, Any]]:
    """Return a record for each class of tokens that occurs, and one for all tokens that begin with white space.

    Shares and entropies are lists with one value for each layer.
    """
    entropy = routes.trace.entropy[:, 0].double().numpy()
    of_token = np.array(routes.classes)
    groups = [(name, of_token == name) for name in CLASSES]
    groups.append(("led by white space", np.array([text.text[:1].isspace() for text in routes.texts])))
    return [
        {
            "class": name,
            "tokens": int(chosen.sum()),
            "shares": [_named(routes.trace.operators, row) for row in operator_shares(routes.trace, chosen)],
            "entropy_mean": [_number(mean) for mean in entropy[:, chosen].mean(1)],
        }
        for name, chosen in groups
        if chosen.any()
    ]


def describe_tokens(routes: TextRoutes) -> Iterator[dict[str, Any]]:
    """Yield a record for each token. Lists have one value for each layer, and gates one list more."""
    trace = routes.trace
    operator, entropy = trace.operator[:, 0].tolist(), trace.entropy[:, 0].tolist()
    meta_gate = trace.meta_gate[0].tolist() if trace.meta_gate is not None else None
    gates = trace.gates[:, 0].tolist() if trace.gates is not None else None
    for place in range(len(routes.tokens)):
        yield {
            "id": routes.tokens[place],
            "text": routes.texts[place].text,
            "control": routes.texts[place].control,
            "class": routes.classes[place],
            "loss": _number(routes.losses[place]),
            "operator": [layer[place] for layer in operator],
            "entropy": [layer[place] for layer in entropy],
            "meta_gate": meta_gate[place] if meta_gate is not None else None,
            "gates": [_gates(layer[place]) for layer in gates] if gates is not None else None,
        }


def _gates(values: list[float]) -> list[float] | None:
    """Return the gates of a token in a layer; None where the layer has none."""
    return None if values[0] != values[0] else values


def flops_saved(routes: TextRoutes, config: ModelConfig) -> dict[str, float]:
    """Return the share of forward FLOPs that these routes save against attention for every token in every layer.

    ``operators`` counts the operators with their routing, ``model`` feed-forward and head as well. ``planning.flops``
    says what counts.
    """
    length = min(len(routes.tokens), config.max_sequence_length)
    shares = [_named(routes.trace.operators, row) for row in operator_shares(routes.trace)]
    attention, rbf = [share["attention"] for share in shares], [share.get("rbf", 0.0) for share in shares]
    routed = forward_flops_of_shares(config, length, attention, rbf)
    dense = forward_flops_of_attention(config, length)
    return {"operators": 1 - routed.operators / dense.operators, "model": 1 - routed.total / dense.total}


def noise_of(config: ModelConfig) -> dict[str, float]:
    """Return mean and deviation of H of white noise, as wide as the model's hidden states."""
    if config.dct.entropy_dc_weight == 1 and config.dct.entropy_epsilon == 0:
        mean, deviation = white_noise_entropy(config.hidden_size)
    else:
        described = describe_noise(config, noise_entropies(config))
        mean, deviation = described.mean, described.deviation
    return {"mean": mean, "deviation": deviation}


def _named(operators: Sequence[str], shares: np.ndarray) -> dict[str, float]:
    return {name: float(share) for name, share in zip(operators, shares, strict=True)}


def _number(value: float) -> float | None:
    """Return a number as JSON has it; None for nan."""
    return None if value != value else float(value)
