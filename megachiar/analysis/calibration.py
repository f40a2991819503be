"""Choose thresholds for the router from the spectral entropies H that a trained model has on a text.

A threshold separates tokens by content only where their entropies differ from those of white noise. Each measurement is
therefore compared with white noise of the model's width.

Shapes: n tokens, d = hidden size, T = sequence length.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megachiar.analysis.windows import counts_of_examples, spread_windows, token_counts, tokens_that_count
from megachiar.config import ModelConfig
from megachiar.data.sampling.dataset import TokenSource, ValidationSet
from megachiar.data.sampling.examples import ExampleSet
from megachiar.kernels.spectral import spectral_entropy, white_noise_entropy
from megachiar.model import ChiarFormer
from megachiar.model.layer import RoutedLayer
from megachiar.model.router import Router, seen_channels

PERCENTILES = (5, 33, 50, 67, 95)
NOISE_SAMPLES = 50_000
DIGITS = 6
"""Entropies that are equal when rounded to so many decimal places are on one side of a threshold."""
LIKE_NOISE = 0.1
"""A distribution with a smaller Kolmogorov-Smirnov distance to noise counts as noise: no threshold on H would tell the
two apart in more than 55% of cases."""
CHANCE = 1.63
"""White noise itself exceeds this distance, divided by the root of the effective sample, once in 100 cases."""


@dataclass(frozen=True)
class Distribution:
    """Mean, standard deviation and ``PERCENTILES`` of spectral entropies, each between 0 and 1."""

    mean: float
    deviation: float
    percentiles: dict[int, float]


@dataclass(frozen=True)
class Measurement:
    """The entropies at one place of a model, and the thresholds that they give.

    Attributes:
        name: ``embedding``, or ``layer 2`` for the input of the second layer.
        tokens: number of tokens measured.
        effective_tokens: number of independent tokens that would tell as much, see ``effective_size``.
        measured: their entropies.
        noise_distance: largest difference (Kolmogorov-Smirnov) between their distribution function and white noise's.
        like_noise: whether that difference may be chance, or is too small to route by.
        bounds: thresholds between the operators, one fewer than there are operators.
        attention_share: share of the tokens that take attention by these thresholds; None without thresholds.
    """

    name: str
    tokens: int
    effective_tokens: float
    measured: Distribution
    noise_distance: float
    like_noise: bool
    bounds: tuple[float, ...]
    attention_share: float | None


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        noise: entropies of white noise, for comparison.
        places: one measurement for each place of the model.
        router: settings for ``model.router``.
    """

    noise: Distribution
    places: list[Measurement]
    router: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, as ``--json`` prints them."""
        return asdict(self)


def config_for(config: ModelConfig, kind: str | None = None, seed: int | None = None) -> ModelConfig:
    """Return the config of a model with the router that thresholds are wanted for.

    Args:
        config: config of the model that is measured.
        kind: ``threshold`` or ``hashed``; None takes that of the model, or ``threshold`` if it has no thresholds.
        seed: of a hashed router; None takes that of the config.
    """
    own = config.router
    kind = kind or (own.kind if own.has_thresholds else "threshold")
    changed = own.model_copy(update={"kind": kind, "seed": own.seed if seed is None else seed})
    return config.model_copy(update={"router": changed})


def calibrate_on_embedding(
    model: ChiarFormer, source: TokenSource | ExampleSet, tokens: int, wanted: ModelConfig | None = None
) -> Calibration:
    """Choose thresholds from the embeddings of a text's tokens: one for all layers, as the paper does.

    ``tau`` is the middle of the 33rd and 67th percentile; three operators take the percentiles themselves. A hashed
    router permutes the channels anew in each layer, and gets thresholds for each.

    Args:
        model: any model; only its embedding is used.
        source: the text, or the examples of a classification.
        tokens: at most so many tokens are read, in blocks spread over the text.
        wanted: config of the router that the thresholds are for, from ``config_for``; None takes the model's.
    """
    config = wanted or config_for(model.config)
    if isinstance(source, ExampleSet):
        counts = counts_of_examples(model, source, tokens)
    else:
        counts = token_counts(source, config.vocab_size, tokens)
    rows = torch.from_numpy(counts.nonzero()[0])
    noise = noise_entropies(config)
    is_hashed = config.router.kind == "hashed"
    places = []
    for layer in range(1, config.num_layers - 1) if is_hashed else [1]:
        with torch.inference_mode():
            values = entropies(config, layer, model.embedding(rows.to(next(model.parameters()).device)))
        sample = Sample(values, counts[rows.numpy()])
        low, high = sample.quantile(0.33), sample.quantile(0.67)
        bounds = (low, high) if len(config.router.operators) == 3 else ((low + high) / 2,)
        name = f"embedding, for layer {layer + 1}" if is_hashed else "embedding"
        places.append(measure(name, sample, effective_size(counts), noise, bounds))
    settings = router_settings(config, [place.bounds for place in places])
    return Calibration(describe_noise(config, noise), places, settings)


def calibrate_on_layers(
    model: ChiarFormer,
    dataset: ValidationSet | ExampleSet,
    attention_share: float,
    sequences: int,
    wanted: ModelConfig | None = None,
) -> Calibration:
    """Choose one threshold for each of the layers 2..L-1 from the hidden states that enter it.

    The layers are measured in order, and each routes by its new threshold before the next one is measured. With all new
    thresholds the model sends ``attention_share`` of the sample to attention in every layer, or as near as tokens of
    equal H allow. The model keeps the new
    thresholds, and the routers of ``wanted``. A model that does not route by thresholds (a baseline) is measured as it
    is.

    Args:
        model: in evaluation mode, on any device.
        dataset: the text, or the examples of a classification, whose padding is left out unless its task counts it.
        attention_share: share of tokens that take attention in each layer, from 0 to 1. With three operators DCT and
            RBF mixing share the other tokens equally.
        sequences: number of windows or examples that are measured, spread over the dataset, in one forward pass.
        wanted: config of the routers that the thresholds are for, from ``config_for``; None takes the model's.
    """
    config = wanted or config_for(model.config)
    noise = noise_entropies(config)
    places: list[Measurement] = []
    three = len(config.router.operators) == 3
    shares = ((1 - attention_share) / 2, 1 - attention_share) if three else (1 - attention_share,)

    def measure_layer(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        index = len(places) + 1
        values = entropies(config, index, inputs[0][rows])
        sample, independent = Sample(values), effective_size(counts, correlation_within(values, ids))
        bounds = tuple(sample.threshold(share) for share in shares)
        place = measure(f"layer {index + 1}", sample, independent, noise, bounds)
        places.append(place)
        if isinstance(layer, RoutedLayer) and layer.router.has_thresholds:
            layer.router = Router(config, index, layer.router.group)
            layer.router.set_thresholds(place.bounds)

    windows = spread_windows(dataset, sequences)
    device = next(model.parameters()).device
    tokens, is_counted = tokens_that_count(model, windows)
    ids, rows = tokens[is_counted], torch.from_numpy(is_counted).to(device)
    counts = np.bincount(ids)
    hooks = [layer.register_forward_pre_hook(measure_layer) for layer in model.layers[1:-1]]
    try:
        with torch.inference_mode():  # targets are given, so that the logits of all tokens never exist at once
            model(*(torch.from_numpy(part).to(device) for part in windows), head=windows.head)
    finally:
        for hook in hooks:
            hook.remove()
    settings = router_settings(config, [place.bounds for place in places])
    return Calibration(describe_noise(config, noise), places, settings)


class Sample:
    """Numbers in ascending order, with how often each occurs."""

    def __init__(self, values: np.ndarray, counts: np.ndarray | None = None):
        order = np.argsort(values)
        self.values = values[order].astype(np.float64)
        self.counts = np.ones(len(values), np.int64) if counts is None else counts[order]
        self._up_to = np.cumsum(self.counts)
        self.size = int(self._up_to[-1])

    def quantile(self, share: float) -> float:
        """Return the smallest number x such that at least ``share`` of all numbers are at most x."""
        index = int(np.searchsorted(self._up_to, share * self.size))
        return float(self.values[min(index, len(self.values) - 1)])

    def threshold(self, share: float) -> float:
        """Return the bound that ``share`` of all numbers do not exceed, as nearly as equal numbers allow.

        It lies half-way between two numbers in [0, 1] that differ when rounded to ``DIGITS``. A share of 0 or 1 is
        returned as the bound itself.
        """
        if not 0 < share < 1:
            return float(share)
        rounded = self.values.round(DIGITS)
        wanted = share * self.size
        index = min(int(np.searchsorted(self._up_to, wanted)), len(rounded) - 1)
        sides = [int(np.searchsorted(rounded, rounded[index], side)) for side in ("left", "right")]
        before, after = (int(self._up_to[side - 1]) if side else 0 for side in sides)
        side = sides[0] if wanted - before < after - wanted else sides[1]
        below = rounded[side - 1] if side else 0.0
        return float(below + rounded[min(side, len(rounded) - 1)]) / 2

    def share_up_to(self, bounds: np.ndarray) -> np.ndarray:
        """Return for each of ``bounds`` the share of all numbers that do not exceed it, float64."""
        return np.concatenate([[0], self._up_to])[np.searchsorted(self.values, bounds, side="right")] / self.size

    def describe(self) -> Distribution:
        """Return mean, standard deviation and percentiles of the numbers."""
        mean = float(np.average(self.values, weights=self.counts))
        deviation = float(np.average((self.values - mean) ** 2, weights=self.counts) ** 0.5)
        return Distribution(mean, deviation, {p: self.quantile(p / 100) for p in PERCENTILES})


def effective_size(counts: np.ndarray, correlation: float = 1.0) -> float:
    """Return the number of independent tokens that tell as much as tokens of few ids, which resemble one another.

    It is Kish's effective size of a sample in clusters, n / (1 + (sum c^2 / n - 1) * correlation) with n = sum c.
    Tokens of one id that are all alike count as (sum c)^2 / sum c^2.

    Args:
        counts: how often each id occurs, c.
        correlation: of two tokens of one id; 1 where they are equal.
    """
    n = float(counts.sum())
    cluster = float((counts.astype(np.float64) ** 2).sum()) / n
    return n / (1 + (cluster - 1) * correlation)


def correlation_within(values: np.ndarray, ids: np.ndarray) -> float:
    """Return the intraclass correlation of ``values`` (n,) within equal ``ids`` (n,): from 0 (unlike) to 1 (equal).

    It is Fisher's estimate from the variances between and within the ids (one-way analysis of variance).
    """
    _, group, counts = np.unique(ids, return_inverse=True, return_counts=True)
    n, groups = len(values), len(counts)
    if groups in (1, n):  # nothing repeats, or nothing to compare with
        return 1.0
    means = np.bincount(group, values) / counts
    between = float((counts * (means - values.mean()) ** 2).sum()) / (groups - 1)
    within = float(((values - means[group]) ** 2).sum()) / (n - groups)
    size = (n - float((counts.astype(np.float64) ** 2).sum()) / n) / (groups - 1)
    total = between + (size - 1) * within
    return min(max((between - within) / total, 0.0), 1.0) if total > 0 else 1.0


def measure(name: str, sample: Sample, independent: float, noise: Sample, bounds: tuple[float, ...]) -> Measurement:
    """Describe ``sample``, the entropies at place ``name``, and compare it with ``noise``.

    Args:
        name: of the place.
        sample: the entropies.
        independent: effective size of the sample.
        noise: entropies of white noise.
        bounds: thresholds between the operators; none where nothing is to be routed by them.
    """
    distance = distribution_distance(sample, noise)
    rounded = tuple(round(bound, DIGITS + 1) for bound in bounds)
    return Measurement(
        name=name,
        tokens=sample.size,
        effective_tokens=independent,
        measured=sample.describe(),
        noise_distance=distance,
        like_noise=distance < max(LIKE_NOISE, CHANCE / independent**0.5),
        bounds=rounded,
        attention_share=1 - float(sample.share_up_to(np.array(rounded[-1:]))[0]) if rounded else None,
    )


def distribution_distance(first: Sample, second: Sample) -> float:
    """Return the largest difference between the two distribution functions (Kolmogorov-Smirnov)."""
    points = np.concatenate([first.values, second.values])
    return float(np.abs(first.share_up_to(points) - second.share_up_to(points)).max())


def entropies(config: ModelConfig, layer: int, rows: torch.Tensor) -> np.ndarray:
    """Return H of hidden states ``rows`` (n, d) as the router of ``layer`` (from 0) computes it, fp32 or fp64 (n,)."""
    weight, epsilon = config.dct.entropy_dc_weight, config.dct.entropy_epsilon
    rows = seen_channels(config, layer, rows)
    return torch.cat([spectral_entropy(part, weight, epsilon) for part in rows.split(4096)]).cpu().numpy()


def noise_entropies(config: ModelConfig) -> Sample:
    """Return entropies of ``NOISE_SAMPLES // 10 * 10`` rows of white noise, as wide as the model's hidden states."""
    return _noise_entropies(config.hidden_size, config.dct.entropy_dc_weight, config.dct.entropy_epsilon)


@functools.cache
def _noise_entropies(d: int, weight: float, epsilon: float) -> Sample:
    generator = torch.Generator().manual_seed(0)
    samples = (torch.randn((NOISE_SAMPLES // 10, d), generator=generator) for _ in range(10))
    return Sample(torch.cat([spectral_entropy(rows, weight, epsilon) for rows in samples]).numpy())


def describe_noise(config: ModelConfig, noise: Sample) -> Distribution:
    """Return mean and deviation by the formula, where the settings of H have one, and percentiles of ``noise``."""
    sampled = noise.describe()
    if config.dct.entropy_dc_weight != 1 or config.dct.entropy_epsilon != 0:
        return sampled
    return Distribution(*white_noise_entropy(config.hidden_size), sampled.percentiles)


def router_settings(config: ModelConfig, bounds: list[tuple[float, ...]]) -> dict[str, Any]:
    """Return settings for ``model.router`` from the bounds of one place for all layers, or of each routed layer."""
    names = ("tau_low", "tau_high") if len(config.router.operators) == 3 else ("tau",)
    columns = zip(*bounds, strict=True)
    values = {n: column[0] if len(column) == 1 else list(column) for n, column in zip(names, columns, strict=True)}
    kind = config.router.kind
    seed = {"seed": config.router.seed} if kind == "hashed" else {}
    return {"kind": kind, **seed, "operators": list(config.router.operators), **values}
