"""Ask what predicts the value of a route before it is taken: spectral entropies, norms, attention, or a linear probe.

A predictor is a number, or several, that a causal router could know of a token before it routes it. Each is turned into
a prediction of the value of attention by a fit to other sequences than the token's own (cross-fitting), so that no
predictor is judged on what it was fitted to, and none needs a sign or a scale:

    one number      the mean value in each tenth of its range
    token id        the mean value of the id, drawn towards the mean of all tokens
    linear probe    ridge regression on [LN(x); H], its penalty by generalised cross-validation

The fit needs the values of thousands of tokens, which take the two forward passes each that ``route_value`` makes. So
it takes values to first order, of all tokens from one backward pass:

    value = <d loss / d y, result of DCT mixing - result of attention>      y: the result that the token goes on with

What the predictions are worth is judged on values of routes that were really switched.

Shapes: R = routed layers, S = sequences, T = tokens of a sequence, d = channels, n tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from megachiar.analysis.routed_tokens import batches
from megachiar.analysis.windows import Windows
from megachiar.model import ChiarFormer
from megachiar.model.attention import SelfAttention
from megachiar.model.dispatch import OperatorTokens
from megachiar.model.layer import RoutedLayer

FOLDS = 5
"""Parts of the sequences, each of which is predicted from the others."""
PROBE_TOKENS = 8192
"""Most tokens whose rows a probe is fitted to."""
WINDOW = 16
"""Tokens of the causal window whose spectrum along time is taken."""
TIME_ENTROPY, ENTROPY, PROBE, TOKEN = "H along time", "H along the channels", "linear probe on [x; H]", "token id"
NORM, CHANGE, FOCUS = "norm of the row", "change since the token before", "entropy of the attention before"


@dataclass(frozen=True)
class PredictorInputs:
    """What is known about the tokens of a text in one routed layer.

    Attributes:
        values: (S, T) fp64, value of attention to first order, in nats; nan where there is no target.
        numbers: (S, T) fp64 of each token, by the name of the predictor.
        rows: (n, d + 1) fp32, [LN(x); H] of some tokens.
        tokens: (n, 2) int64, sequence and position of those tokens.
    """

    values: np.ndarray
    numbers: dict[str, np.ndarray]
    rows: np.ndarray
    tokens: np.ndarray


def collect_inputs(
    model: ChiarFormer,
    windows: Windows,
    batch_size: int,
    wanted: np.ndarray,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[PredictorInputs]:
    """Run ``model`` forward and backward over sequences; return what is known about their tokens in each routed layer.

    Args:
        model: in evaluation mode, fp32 or fp64, with a router that chooses one operator.
        windows: S windows of T tokens.
        batch_size: sequences of a pass.
        wanted: (n, 2) int64, sequence and position of tokens whose rows are kept in any case.
        seed: of the other tokens whose rows are kept.
        advance: is told of sequences that have been run.
    """
    tokens = _sample_tokens(windows, wanted, seed)
    layers = [layer for layer in model.layers if isinstance(layer, RoutedLayer)]
    found: list[list[dict[str, np.ndarray]]] = [[] for _ in layers]
    kept: list[list[np.ndarray]] = [[] for _ in layers]
    first = 0
    for batch in batches(model, windows, batch_size):
        count = len(batch[0])
        mine = tokens[(tokens[:, 0] >= first) & (tokens[:, 0] < first + count)] - [first, 0]
        for place, watch in enumerate(_watch_batch(model, layers, batch)):
            found[place].append(watch.numbers(batch[1].shape))
            kept[place].append(watch.features()[mine[:, 0] * batch[0].shape[1] + mine[:, 1]].float().cpu().numpy())
        first += count
        advance(count)
    results = []
    for parts, rows in zip(found, kept, strict=True):
        numbers = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        values = np.where(windows.targets >= 0, numbers.pop("value"), np.nan)
        results.append(PredictorInputs(values=values, numbers=numbers, rows=np.concatenate(rows), tokens=tokens))
    return results


def _sample_tokens(windows: Windows, wanted: np.ndarray, seed: int) -> np.ndarray:
    """Return sequence and position (n, 2) of the tokens whose rows are kept, in the order of the text."""
    length = windows.inputs.shape[1]
    have_target = np.flatnonzero(windows.targets.ravel() >= 0)
    others = np.random.default_rng([seed, 2]).permutation(have_target)[:PROBE_TOKENS]
    places = np.union1d(wanted[:, 0] * length + wanted[:, 1], others)
    return np.stack([places // length, places % length], 1)


class _Watch:
    """What hooks see of one routed layer in a forward pass; rows are in the order of sequences and positions."""

    def __init__(self, layer: RoutedLayer):
        self.layer = layer
        self.x = self.entropy = self.y = self.difference = torch.empty(0)
        self.focus: torch.Tensor | None = None
        self.gradient: torch.Tensor | None = None
        self.layout: Any = None

    def see_router(self, _: nn.Module, arguments: tuple, decision: Any) -> None:
        self.x, self.layout = arguments[0].detach(), arguments[1]
        self.entropy = decision.entropy

    def see_result(self, _: nn.Module, arguments: tuple) -> tuple:
        """Keep the result of the operators, and compute what both would have given."""
        self.y = arguments[0] if arguments[0].requires_grad else arguments[0].detach().requires_grad_()
        everything = torch.arange(len(self.x), device=self.x.device)
        with torch.no_grad():
            tokens = OperatorTokens(indices=everything, counts_per_rank=None, local_indices=everything)
            attended = self.layer.attention.forward(self.x, self.x, tokens, self.layout, None)
            self.difference = attended - self.layer.dct.forward(self.x)
        return (self.y, *arguments[1:])

    def features(self) -> torch.Tensor:
        """Return [LN(x); H] (N, d + 1)."""
        return torch.cat([F.layer_norm(self.x, self.x.shape[1:]), self.entropy[:, None].to(self.x.dtype)], 1)

    def starts(self, shape: torch.Size) -> torch.Tensor:
        """Return the first position (B, T) of each token's document; 0 where a sequence is one document."""
        if self.layout.document_starts is not None:
            return self.layout.document_starts
        return torch.zeros(shape, dtype=torch.int64, device=self.x.device)

    def numbers(self, shape: torch.Size) -> dict[str, np.ndarray]:
        """Return the values, and the predictors that are one number a token, each (B, T)."""
        assert self.gradient is not None, "the backward pass is over"
        x, starts = self.x.view(*shape, -1), self.starts(shape)
        is_first = torch.arange(shape[1], device=x.device) == starts
        before = F.pad(x[:, :-1], (0, 0, 1, 0)).masked_fill(is_first[..., None], 0)
        found = {
            "value": -(self.gradient * self.difference).sum(-1),
            ENTROPY: self.entropy,
            TIME_ENTROPY: time_entropy(x, WINDOW, starts),
            NORM: x.norm(dim=-1),
            CHANGE: (x - before).norm(dim=-1),
            **({FOCUS: self.focus} if self.focus is not None else {}),
        }
        return {name: value.reshape(shape).double().cpu().numpy() for name, value in found.items()}


def _watch_batch(model: ChiarFormer, layers: list[RoutedLayer], batch: tuple[torch.Tensor, ...]) -> list[_Watch]:
    """Run a batch forward and backward, and return what was seen of each routed layer."""
    watches = [_Watch(layer) for layer in layers]
    hooks: list[Any] = []
    for watch in watches:
        hooks.append(watch.layer.router.register_forward_hook(watch.see_router))
        hooks.append(watch.layer.feed_forward.register_forward_pre_hook(watch.see_result))
    for earlier, watch in pairwise(watches):
        hooks.append(earlier.layer.attention.register_forward_pre_hook(partial(_see_attention, watch)))
    try:
        with torch.enable_grad():
            loss = model(*batch).loss
            assert loss is not None, "there are targets"
            gradients = torch.autograd.grad(loss, [watch.y for watch in watches])
    finally:
        for hook in hooks:
            hook.remove()
    for watch, gradient in zip(watches, gradients, strict=True):
        watch.gradient = gradient * (batch[1] >= 0).sum()  # the loss is a mean over the targets
    return watches


def _see_attention(later: _Watch, module: nn.Module, arguments: tuple) -> None:
    """Measure how spread the attention of the layer before is, for every token, whether it attends there or not."""
    assert isinstance(module, SelfAttention)
    with torch.no_grad():
        q, k = module.queries_and_keys(arguments[0].detach(), arguments[3])
        starts = arguments[3].document_starts
        later.focus = torch.stack(
            [attention_entropy(q[b], k[b], None if starts is None else starts[b]) for b in range(len(q))]
        )


def attention_entropy(q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Return the entropy (T,) of the weights of each query, the mean over the heads, as a part of its largest value.

    The first query of a document has one key, and an entropy of 0.

    Args:
        q, k: (h, T, c), rotated queries and keys of a sequence.
        starts: (T,) first position of each token's document; None where attention crosses documents.
    """
    length = q.shape[1]
    place = torch.arange(length, device=q.device)
    first = torch.zeros_like(place) if starts is None else starts
    hidden = (place > place[:, None]) | (place < first[:, None])
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    entropy = torch.special.entr(scores.softmax(-1)).sum(-1).mean(0)
    return entropy / (place - first + 1).to(entropy.dtype).log().clamp_min(math.log(2))


def time_entropy(x: torch.Tensor, window: int, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Return the spectral entropy (B, T) along time of rows ``x`` (B, T, d), in [0, 1].

    The spectrum of a token is that of the last ``window`` rows up to its own: a DCT along time of each channel, and the
    power of the channels together. At the start of a document the first row is repeated.

    Args:
        x: the rows.
        window: rows of a spectrum.
        starts: (B, T) first position of each token's document; None where a sequence is one.
    """
    length = x.shape[1]
    first = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device) if starts is None else starts
    places = torch.arange(length, device=x.device)[:, None] + torch.arange(1 - window, 1, device=x.device)
    places = torch.maximum(places, first[..., None])  # (B, T, window)
    rows = x[torch.arange(len(x), device=x.device)[:, None, None], places].mT  # (B, T, d, window)
    place = torch.arange(window, device=x.device, dtype=x.dtype)
    basis = torch.cos(math.pi / window * (place[None] + 0.5) * place[:, None]) * math.sqrt(2 / window)
    basis[0] *= math.sqrt(0.5)
    power = (rows @ basis.T).square().sum(2)
    share = power / power.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.special.entr(share).sum(-1) / math.log(window)


def predictions(inputs: PredictorInputs, ids: np.ndarray, wanted: np.ndarray) -> dict[str, np.ndarray]:
    """Return what each predictor says of tokens, fitted to the values of other sequences.

    Args:
        inputs: of the layer.
        ids: (S, T) token ids.
        wanted: (n, 2) int64, sequence and position of the tokens; all are among ``inputs.tokens``.

    Returns:
        (n,) fp64 by the name of the predictor, in nats.
    """
    fold = np.arange(len(ids)) % FOLDS
    found = {name: np.empty(len(wanted)) for name in (*inputs.numbers, TOKEN, PROBE)}
    place_of = {tuple(token): place for place, token in enumerate(inputs.tokens.tolist())}
    rows = inputs.rows[[place_of[tuple(token)] for token in wanted.tolist()]]
    for number in range(FOLDS):
        mine = fold[wanted[:, 0]] == number
        others = (fold != number)[:, None] & np.isfinite(inputs.values)
        at = tuple(wanted[mine].T)
        for name, numbers in inputs.numbers.items():
            found[name][mine] = mean_in_tenths(numbers[others], inputs.values[others], numbers[at])
        found[TOKEN][mine] = mean_of_ids(ids[others], inputs.values[others], ids[at])
        chosen = others[tuple(inputs.tokens.T)]
        values = inputs.values[tuple(inputs.tokens[chosen].T)]
        found[PROBE][mine] = ridge(inputs.rows[chosen], values, rows[mine])
    return found


def mean_in_tenths(numbers: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the mean value (n,) in the tenth of ``numbers`` (m,) in which each of ``wanted`` (n,) lies."""
    edges = np.quantile(numbers, np.arange(1, 10) / 10)
    tenth, mean = np.searchsorted(edges, numbers), values.mean()
    count, total = np.bincount(tenth, minlength=10), np.bincount(tenth, values, minlength=10)
    means = np.where(count > 0, total / np.maximum(count, 1), mean)
    return means[np.searchsorted(edges, wanted)]


def mean_of_ids(ids: np.ndarray, values: np.ndarray, wanted: np.ndarray, prior: float = 10.0) -> np.ndarray:
    """Return the mean value (n,) of each of the ids ``wanted`` (n,), with ``prior`` tokens of the mean of all."""
    size, mean = int(max(ids.max(), wanted.max(initial=0))) + 1, values.mean()
    count, total = np.bincount(ids, minlength=size), np.bincount(ids, values, minlength=size)
    return ((total + prior * mean) / (count + prior))[wanted]


def ridge(rows: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return predictions (n,) for rows ``wanted`` (n, p) by ridge regression on ``rows`` (m, p), ``values`` (m,).

    Columns are standardised. The penalty is the one, of 13, with the least generalised cross-validation.
    """
    mean, spread = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    spread = np.where(spread > 0, spread, 1.0)
    x, y = (rows - mean) / spread, values - values.mean()
    eigenvalues, vectors = np.linalg.eigh(x.T @ x)
    eigenvalues = eigenvalues.clip(0)
    projected = vectors.T @ (x.T @ y)
    best, weights = np.inf, np.zeros(x.shape[1])
    for penalty in len(x) * 10.0 ** np.linspace(-4, 2, 13):
        shrunk = projected / (eigenvalues + penalty)
        error = y @ y - 2 * shrunk @ projected + (shrunk**2) @ eigenvalues
        freedom = (eigenvalues / (eigenvalues + penalty)).sum()
        if (score := error / (len(x) - freedom) ** 2) < best:
            best, weights = score, vectors @ shrunk
    return values.mean() + (wanted - mean) / spread @ weights
