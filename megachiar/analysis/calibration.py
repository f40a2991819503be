"""Thresholds for the router, from the spectral entropies that a trained model shows on a text.

A threshold says something only where the entropies differ from those of white noise: next to every distribution stands
that of noise of the same width, and how far the two are apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megachiar.config import ModelConfig
from megachiar.data.sampling.dataset import TokenSource, ValidationSet, token_blocks
from megachiar.kernels.spectral import spectral_entropy, white_noise_entropy
from megachiar.model import ChiarFormer

PERCENTILES = (5, 33, 50, 67, 95)
NOISE_SAMPLES = 50_000
LIKE_NOISE = 0.1
"""Kolmogorov-Smirnov distance below which a distribution counts as noise's: no threshold on H would tell the two apart
in more than 55% of cases."""


@dataclass(frozen=True)
class Distribution:
    """Spectral entropies H: mean, standard deviation and ``PERCENTILES``."""

    mean: float
    deviation: float
    percentiles: dict[int, float]


@dataclass(frozen=True)
class Place:
    """Entropies at one place of a model.

    Attributes:
        name: ``embedding``, or ``layer 2`` for the input of the second layer.
        tokens: how many were measured.
        measured: their entropies.
        noise_distance: largest difference (Kolmogorov-Smirnov) of their distribution function to that of white noise.
        like_noise: whether that may be chance, or too little to route by.
        bounds: thresholds between the operators, one number less than there are operators.
    """

    name: str
    tokens: int
    measured: Distribution
    noise_distance: float
    like_noise: bool
    bounds: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What was found: ``noise`` for comparison, each place, and the settings for ``model.router``."""

    noise: Distribution
    places: list[Place]
    router: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate_on_embedding(model: ChiarFormer, source: TokenSource, tokens: int) -> Calibration:
    """One threshold for all layers, as published: from the embeddings of a text's tokens.

    ``tau`` is the middle of the 33rd and 67th percentile; three operators take the percentiles themselves.

    Args:
        model: any; only its embedding is used.
        source: the text.
        tokens: read at most so many, in blocks spread over the text.
    """
    config = model.config
    counts = token_counts(source, config.vocab_size, tokens)
    rows = torch.from_numpy(counts.nonzero()[0])
    with torch.inference_mode():
        values = entropies(config, model.embedding(rows.to(next(model.parameters()).device)))
    sample = Sample(values, counts[rows.numpy()])
    low, high = sample.quantile(0.33), sample.quantile(0.67)
    three = len(config.router.operators) == 3
    noise = noise_entropies(config)
    place = measure("embedding", sample, noise, (low, high) if three else ((low + high) / 2,))
    settings = router_settings(config, [place.bounds])
    return Calibration(describe_noise(config, noise), [place], settings)


def calibrate_on_layers(
    model: ChiarFormer, dataset: ValidationSet, attention_share: float, sequences: int
) -> Calibration:
    """One threshold for each of the layers 2..L-1, from what enters it.

    The layers are taken in order, and each routes by its new threshold before the next is measured, so that the model
    with all of them sends ``attention_share`` of the sample to attention in every layer. Its thresholds are left
    changed. Models that do not route by thresholds (a baseline) are measured as they are.

    Args:
        model: in evaluation mode, on any device.
        dataset: the text.
        attention_share: of each layer; with three operators the rest is shared alike between DCT and RBF mixing.
        sequences: windows of the text that are measured, spread over it, in one forward pass.
    """
    noise = noise_entropies(model.config)
    places: list[Place] = []
    three = len(model.config.router.operators) == 3
    shares = ((1 - attention_share) / 2, 1 - attention_share) if three else (1 - attention_share,)

    def visit(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sample = Sample(entropies(model.config, inputs[0]))
        number = len(places) + 2
        place = measure(f"layer {number}", sample, noise, tuple(sample.threshold(share) for share in shares))
        places.append(place)
        router = getattr(layer, "router", None)
        if router is not None and router.kind == "threshold":
            router.bounds = place.bounds

    hooks = [layer.register_forward_pre_hook(visit) for layer in model.layers[1:-1]]
    try:
        inputs, targets = spread_windows(dataset, sequences)
        device = next(model.parameters()).device
        with torch.inference_mode():  # with targets, so that the logits of all tokens never exist at once
            model(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    settings = router_settings(model.config, [place.bounds for place in places])
    return Calibration(describe_noise(model.config, noise), places, settings)


class Sample:
    """Numbers with how often each occurs, in ascending order."""

    def __init__(self, values: np.ndarray, counts: np.ndarray | None = None):
        order = np.argsort(values)
        self.values = values[order].astype(np.float64)
        self.counts = np.ones(len(values), np.int64) if counts is None else counts[order]
        self._up_to = np.cumsum(self.counts)
        self.size = int(self._up_to[-1])

    def quantile(self, share: float) -> float:
        """The least number that at least ``share`` of all are not above."""
        index = np.searchsorted(self._up_to, share * self.size)
        return float(self.values[min(index, len(self.values) - 1)])

    def threshold(self, share: float) -> float:
        """A bound that ``share`` of all numbers, which lie in [0, 1], are not above: half-way to the next number."""
        if not 0 < share < 1:
            return float(share)
        below = self.quantile(share)
        above = self.values[min(np.searchsorted(self.values, below, side="right"), len(self.values) - 1)]
        return (below + float(above)) / 2

    def share_up_to(self, bounds: np.ndarray) -> np.ndarray:
        """Share of all numbers that are not above each of ``bounds``."""
        return np.concatenate([[0], self._up_to])[np.searchsorted(self.values, bounds, side="right")] / self.size

    def describe(self) -> Distribution:
        mean = float(np.average(self.values, weights=self.counts))
        deviation = float(np.average((self.values - mean) ** 2, weights=self.counts) ** 0.5)
        return Distribution(mean, deviation, {p: self.quantile(p / 100) for p in PERCENTILES})


def measure(name: str, sample: Sample, noise: Sample, bounds: tuple[float, ...]) -> Place:
    """Describe ``sample`` and compare it with ``noise``."""
    distance = distribution_distance(sample, noise)
    # Equal tokens have equal embeddings: chance is judged by how many different numbers there are (5% level).
    chance = 1.36 / len(np.unique(sample.values)) ** 0.5
    rounded = tuple(round(bound, 6) for bound in bounds)
    return Place(name, sample.size, sample.describe(), distance, distance < max(LIKE_NOISE, chance), rounded)


def distribution_distance(first: Sample, second: Sample) -> float:
    """Largest difference between the distribution functions (Kolmogorov-Smirnov)."""
    points = np.concatenate([first.values, second.values])
    return float(np.abs(first.share_up_to(points) - second.share_up_to(points)).max())


def entropies(config: ModelConfig, rows: torch.Tensor) -> np.ndarray:
    """H of rows (n, d) as the model's routers compute it, fp32 or fp64 (n,)."""
    weight, epsilon = config.dct.entropy_dc_weight, config.dct.entropy_epsilon
    return torch.cat([spectral_entropy(part, weight, epsilon) for part in rows.split(4096)]).cpu().numpy()


def noise_entropies(config: ModelConfig) -> Sample:
    """H of white noise as wide as the model."""
    generator = torch.Generator().manual_seed(0)
    shape, blocks = (NOISE_SAMPLES // 10, config.hidden_size), range(10)
    samples = (torch.randn(shape, generator=generator) for _ in blocks)
    weight, epsilon = config.dct.entropy_dc_weight, config.dct.entropy_epsilon
    return Sample(torch.cat([spectral_entropy(rows, weight, epsilon) for rows in samples]).numpy())


def describe_noise(config: ModelConfig, noise: Sample) -> Distribution:
    """Mean and deviation by formula where there is one, percentiles from the samples."""
    sampled = noise.describe()
    if config.dct.entropy_dc_weight != 1 or config.dct.entropy_epsilon != 0:
        return sampled
    return Distribution(*white_noise_entropy(config.hidden_size), sampled.percentiles)


def router_settings(config: ModelConfig, bounds: list[tuple[float, ...]]) -> dict[str, Any]:
    """What to set under ``model.router``: a number for all layers, or a list with one for each."""
    names = ("tau_low", "tau_high") if len(config.router.operators) == 3 else ("tau",)
    columns = zip(*bounds, strict=True)
    values = {n: column[0] if len(column) == 1 else list(column) for n, column in zip(names, columns, strict=True)}
    return {"kind": "threshold", "operators": list(config.router.operators), **values}


def token_counts(source: TokenSource, vocab_size: int, tokens: int) -> np.ndarray:
    """How often each id (vocab_size,) occurs among ``tokens`` tokens of a text, or all of it."""
    counts = np.zeros(vocab_size, np.int64)
    for block in token_blocks(source, tokens):
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def spread_windows(dataset: ValidationSet, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of full windows spread evenly over the text; of a text shorter than one, what there is."""
    full = dataset.targets // dataset.sequence_length
    if full == 0:
        inputs, targets = dataset.batch(0, 1)
        return inputs[:, : dataset.targets], targets[:, : dataset.targets]
    chosen = np.unique(np.linspace(0, full - 1, min(sequences, full)).astype(np.int64)).tolist()
    parts = [dataset.batch(window, window + 1) for window in chosen]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
