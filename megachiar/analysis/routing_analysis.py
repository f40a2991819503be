"""Answer whether a router knows anything: run a model over a text, and look at its routes from every side.

    routes, H, losses of a text    against white noise, against permuted channels, against features of the tokens
    other checkpoints of the run   whether tokens keep their routes
    a baseline                     whether H follows how far back attention looks
    single tokens switched         what a route is worth, the router's regret, and that of what else might predict it
    all tokens rerouted            what all routes together are worth

Everything is seeded, and memory holds one batch and one number a token and layer.

Shapes: A = attention layers of a baseline, R = routed layers, S = sequences, T = tokens of a sequence, V = vocabulary,
N = S * T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megachiar.analysis.calibration import noise_entropies
from megachiar.analysis.permuted_channels import ChannelPermutations
from megachiar.analysis.route_interventions import COINS, measure_interventions
from megachiar.analysis.route_value import choose_tokens, route_values
from megachiar.analysis.routed_tokens import RoutedTokens, collect_routes
from megachiar.analysis.routing_findings import (
    Finding,
    channel_findings,
    distance_findings,
    entropy_findings,
    information_findings,
    loss_findings,
    share_findings,
    stability_finding,
)
from megachiar.analysis.routing_worth import intervention_findings, predictor_findings, value_findings
from megachiar.analysis.token_features import frequency_classes, position_classes, quantile_classes
from megachiar.analysis.value_predictors import collect_inputs
from megachiar.analysis.windows import Windows
from megachiar.config import RunConfig
from megachiar.model import ChiarFormer

INTERVENTIONS = 3 + COINS
"""Forward passes over the text with other routes than the model's own."""


@dataclass(frozen=True)
class Subject:
    """The model that is analysed.

    Attributes:
        run: as it was given.
        checkpoint: that is read.
        config: of the run.
        model: in fp32.
        step: of the checkpoint.
        data: prefix of the text.
    """

    run: Path
    checkpoint: Path
    config: RunConfig
    model: ChiarFormer
    step: int
    data: Path


@dataclass(frozen=True)
class Text:
    """The tokens that an analysis reads.

    Attributes:
        windows: S windows of T tokens.
        counts: (V,) how often each id occurs in the whole text.
        words: (S, T) the kind of each token, an index into ``token_features.WORD_CLASSES``; None without a tokenizer.
    """

    windows: Windows
    counts: np.ndarray
    words: np.ndarray | None


@dataclass(frozen=True)
class Settings:
    """How much an analysis measures.

    Attributes:
        switches: tokens whose route is switched, in every routed layer; 0 for none.
        permutations: orders of the channels.
        batch_size: sequences of a forward pass.
        seed: of everything that is drawn.
    """

    switches: int
    permutations: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint of the run: its step, and a function that loads its model."""

    step: int
    load: Callable[[], ChiarFormer]


def sequences_to_run(text: Text, settings: Settings, layers: int, steps: int, is_soft: bool) -> int:
    """Return about how many sequences an analysis runs, for its progress.

    Args:
        text: that is read.
        settings: of the analysis.
        layers: routed layers.
        steps: checkpoints that are compared.
        is_soft: whether the router is soft, so that no route is changed.
    """
    sequences = len(text.windows.inputs)
    total = (2 + steps) * sequences
    if is_soft:
        return total
    switched = min(sequences, settings.switches)
    batches = switched and math.ceil(settings.switches * layers / switched / max(1, settings.batch_size - 1))
    predicted = sequences if settings.switches else 0
    return total + predicted + INTERVENTIONS * sequences + settings.switches * layers + switched * batches


def analyze_routing(
    model: ChiarFormer,
    text: Text,
    settings: Settings,
    *,
    steps: Sequence[SavedStep] = (),
    distances: np.ndarray | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Finding]:
    """Return all findings about the routers of a model, by section and layer.

    Args:
        model: with routed layers, in evaluation mode, fp32 or fp64.
        text: that is read.
        settings: of the analysis.
        steps: checkpoints of the run, oldest first, whose routes are compared; fewer than two for none.
        distances: (A, S, T) mean attention distance in each layer of a baseline on the same tokens. H of a routed layer
            is compared with the mean of them and with the baseline's layer of the same number.
        advance: is told of sequences that have been run.
    """
    routed = collect_routes(model, text.windows, settings.batch_size, advance)
    permute = ChannelPermutations(model, settings.permutations, settings.seed)
    permuted = permute(text.windows, settings.batch_size, advance)
    found = _of_tokens(model, routed, permuted, text, settings)
    for place, index in enumerate(routed.layers):
        if distances is not None:
            beside = {"mean of its layers": distances.mean(0)}
            if index < len(distances):
                beside[f"its layer {index + 1}"] = distances[index]
            found += distance_findings(index + 1, routed.entropy[place], beside, routed.clusters, settings.seed)
    found += _stability(steps, text, settings, advance)
    if model.config.router.kind != "soft":
        found += _worth(model, routed, text, settings, advance)
    order = list(dict.fromkeys(finding.section for finding in found))
    return sorted(found, key=lambda finding: order.index(finding.section))


def _of_tokens(
    model: ChiarFormer, routed: RoutedTokens, permuted: np.ndarray, text: Text, settings: Settings
) -> list[Finding]:
    """Describe the routes of each layer from what is known about the tokens."""
    seed, clusters = settings.seed, routed.clusters
    losses = routed.losses.ravel()
    has_loss = np.isfinite(losses)
    features = {
        "token id": routed.ids,
        "frequency": frequency_classes(routed.ids, text.counts),
        **({"kind of word": text.words} if text.words is not None else {}),
        "position": position_classes(routed.ids.shape),
        "next-token loss": quantile_classes(routed.losses),
    }
    flat = {name: classes.ravel() for name, classes in features.items()}
    noise, found = noise_entropies(model.config), []
    for place, index in enumerate(routed.layers):
        layer = index + 1
        operator, entropy = routed.operator[place].ravel().astype(np.int64), routed.entropy[place].ravel()
        attends = routed.attends[place].ravel()
        found += share_findings(layer, operator, routed.operators, clusters, seed)
        of_entropy = entropy_findings(layer, entropy, noise, clusters)
        found += of_entropy
        like_noise = bool(of_entropy[0].details["like_noise"])
        others = permuted[place].reshape(len(permuted[place]), -1)
        found += channel_findings(layer, operator, others, like_noise)
        found += information_findings(layer, operator, flat, clusters, seed)
        found += loss_findings(
            layer, attends[has_loss], entropy[has_loss], losses[has_loss], clusters.select(has_loss), seed
        )
    return found


def _stability(
    steps: Sequence[SavedStep], text: Text, settings: Settings, advance: Callable[[int], None]
) -> list[Finding]:
    """Compare the routes of each checkpoint with those of the one before it."""
    found: list[Finding] = []
    if len(steps) < 2:
        return found
    before: RoutedTokens | None = None
    earlier = 0
    for saved in steps:
        after = collect_routes(saved.load(), text.windows, settings.batch_size, advance)
        if before is not None:
            for place, index in enumerate(after.layers):
                first, second = (tokens.operator[place].ravel().astype(np.int64) for tokens in (before, after))
                between = (earlier, saved.step)
                found.append(stability_finding(index + 1, between, first, second, after.clusters, settings.seed))
        before, earlier = after, saved.step
    return found


def _worth(
    model: ChiarFormer, routed: RoutedTokens, text: Text, settings: Settings, advance: Callable[[int], None]
) -> list[Finding]:
    """Describe what routes are worth, one by one and all together."""
    found: list[Finding] = []
    if settings.switches:
        tokens = choose_tokens(text.windows.targets, settings.switches, settings.seed)
        values = route_values(model, routed, text.windows.targets, tokens, settings.batch_size, advance)
        attention = routed.operators.index("attention")
        is_threshold = model.config.router.kind == "threshold"
        for of_layer in values:
            found += value_findings(of_layer, attention, routed.ids, is_threshold, settings.seed)
        if knows_both_results(model):
            inputs = collect_inputs(model, text.windows, settings.batch_size, tokens, settings.seed, advance)
            for of_layer, of_inputs in zip(values, inputs, strict=True):
                found += predictor_findings(of_layer, of_inputs, attention, routed.ids, settings.seed)
    changes = measure_interventions(
        model, routed, text.windows, seed=settings.seed, batch_size=settings.batch_size, advance=advance
    )
    return found + intervention_findings(changes)


def knows_both_results(model: ChiarFormer) -> bool:
    """Return whether a token's results of both operators depend on no other token's route in the same layer."""
    return model.config.attention.keys == "all"


def verdicts(findings: Sequence[Finding]) -> dict[int, str]:
    """Return a sentence about each routed layer, by its number: who decides, and whether that is worth anything."""
    sentences: dict[int, str] = {}
    layers = sorted({finding.layer for finding in findings if finding.layer is not None})
    for layer in layers:
        of_layer = {finding.measure: finding for finding in findings if finding.layer == layer}
        share = of_layer["share of attention"]
        parts = [f"attention takes {share.value:.0%} of the tokens"]
        collapsed = [f for f in of_layer.values() if f.section == "shares" and f.verdict.startswith("collapsed")]
        if collapsed:
            parts.append("routing has collapsed")
        parts.append(f"H is {of_layer['distance of H from white noise'].verdict}")
        by_id = of_layer["route explained by token id"]
        if by_id.value > 0.5:
            parts.append(f"the token id explains {by_id.value:.0%} of the routes")
        regret = of_layer.get("regret (0 the oracle, 1 a coin)")
        if regret is not None and np.isfinite(regret.value):
            parts.append(f"regret {regret.value:.2f} [{regret.low:.2f}, {regret.high:.2f}]: {regret.verdict}")
        sentences[layer] = "; ".join(parts)
    return sentences
