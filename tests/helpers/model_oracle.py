"""The model, written a second time in a slow way: every operator for every token, then a selection. It is in float64.

It shares nothing with the package but the names of the weights. Shapes: B sequences, T tokens, d channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import scipy.fft
import scipy.special
import torch
import torch.nn.functional as F
from torch import Tensor

from megachiar.config.model import ModelConfig


@dataclass
class OracleResult:
    """The result of a forward pass.

    Attributes:
        logits: (B, T, V).
        regulariser: scalar that is added to the loss.
        operators: each token's operator, (B, T), for each routed layer.
        entropies: each token's spectral entropy, (B, T), for each routed layer.
    """

    logits: Tensor
    regulariser: Tensor
    operators: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)


class Oracle:
    """The model with given ``weights``: its parameters and buffers by name, float64."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]):
        self.config, self.w = config, weights
        d = config.hidden_size
        self.c = torch.from_numpy(scipy.fft.dct(np.eye(d), axis=0, norm="ortho"))

    def __call__(self, tokens: Tensor) -> OracleResult:
        config = self.config
        result = OracleResult(torch.empty(0), torch.zeros((), dtype=torch.float64))
        x = self.w["embedding.weight"][tokens] * config.embedding_multiplier
        for index in range(config.num_layers):
            name = f"layers.{index}"
            if config.kind == "baseline" or index == config.num_layers - 1:
                x = self.feed_forward(self.attention(x, f"{name}.operator"), name)
            elif index == 0:
                after = self.feed_forward(self.dct(x, f"{name}.operator"), name)
                g = self.gate(x)
                x = g * after + (1 - g) * x
            else:
                x = self.routed(x, index, result)
        result.logits = self.norm(x, "norm") @ self.w["embedding.weight"].T
        return result

    # Sub-layers ------------------------------------------------------------------------------------------------------

    def routed(self, x: Tensor, index: int, result: OracleResult) -> Tensor:
        name, router = f"layers.{index}", self.config.router
        entropy = self.entropy(x)
        functions = {"dct": self.dct, "rbf": self.rbf, "attention": self.attention}
        gates = None
        if router.kind in ("soft", "hard"):
            weight, bias = self.w[f"{name}.router.gate.weight"], self.w[f"{name}.router.gate.bias"]
            gates = (torch.cat([x, entropy[..., None]], -1) @ weight.T + bias).softmax(-1)
            operator = gates.argmax(-1)
        elif router.kind in ("threshold", "hashed"):
            decides = self.seen_entropy(x, index)
            operator = sum((decides > bound).long() for bound in self.bounds(index))
        elif router.kind == "learned":  # whose threshold is 0 at the start
            operator = (self.predicted_order(x, entropy, name) > 0).long()
        else:
            below = 1 - router.attention_share
            bounds = [below - router.rbf_share, below] if "rbf" in router.operators else [below]
            draws = [[coin(router.seed, index, sample, t) for t in range(x.shape[1])] for sample in range(len(x))]
            operator = torch.tensor([[sum(draw > bound for bound in bounds) for draw in row] for row in draws])
        attends = operator == len(router.operators) - 1
        if self.config.attention.keys == "routed":
            functions["attention"] = lambda x, name: self.attention(x, name, attends)
        every = torch.stack([functions[o](x, f"{name}.{o}") for o in router.operators], -1)  # (B, T, d, O)
        weights = F.one_hot(operator, every.shape[-1]).to(x) if router.kind != "soft" else gates
        if router.kind == "hard":  # as the published code writes it
            straight_through = (weights - gates).detach() + gates
            knows_all = router.hard_gradient == "published" or operator[..., None] > 0
            weights = torch.where(torch.as_tensor(knows_all), straight_through, weights)
        y = (every * weights[:, :, None]).sum(-1)
        result.operators.append(operator)
        result.entropies.append(entropy.detach())
        if router.collapse_weight:
            fractions = gates.mean((0, 1)) if gates is not None else self.soft_fractions(x, index)
            negative_entropy = sum(q * torch.log(q) for q in fractions)
            result.regulariser = result.regulariser + router.collapse_weight * negative_entropy
        return self.feed_forward(y, name)

    def bounds(self, index: int) -> list[float]:
        router = self.config.router
        names = ("tau",) if len(router.operators) == 2 else ("tau_low", "tau_high")
        values = [getattr(router, n) for n in names]
        return [v[index - 1] if isinstance(v, tuple) else v for v in values]

    def predicted_order(self, x: Tensor, entropy: Tensor, name: str) -> Tensor:
        """Return numbers (B, T) in the order of what a learned router predicts."""
        d = x.shape[-1]
        mean = (scipy.special.psi(d / 2 + 1) - scipy.special.psi(1.5)) / math.log(d)
        spread = 1.5 / (d / 2 + 1) * scipy.special.polygamma(1, 1.5) - scipy.special.polygamma(1, d / 2 + 1)
        centred = x - x.mean(-1, keepdim=True)
        rows = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        surprise = (entropy - mean) / (math.sqrt(spread) / math.log(d))
        weight = self.w[f"{name}.router.value_head.weight"][0]
        return (rows @ weight[:-1] + surprise * weight[-1]).detach()

    def seen_entropy(self, x: Tensor, index: int) -> Tensor:
        """Return H (B, T) as a threshold or hashed router compares it with its thresholds."""
        if self.config.router.kind == "hashed":
            order = permutation(self.config.router.seed, index, x.shape[-1])
            x = torch.stack([x[..., channel] for channel in order], -1)
        return self.entropy(x)

    def soft_fractions(self, x: Tensor, index: int) -> list[Tensor]:
        entropy = self.seen_entropy(x, index)
        width = self.config.router.collapse_temperature
        above = [torch.sigmoid((entropy - bound) / width).mean() for bound in self.bounds(index)]
        edges = [torch.ones(()), *above, torch.zeros(())]
        return [edges[i] - edges[i + 1] for i in range(len(edges) - 1)]

    def entropy(self, x: Tensor) -> Tensor:
        settings = self.config.dct
        power = (x @ self.c.T) ** 2
        power = power * torch.tensor([settings.entropy_dc_weight] + [1.0] * (x.shape[-1] - 1), dtype=torch.float64)
        epsilon = settings.entropy_epsilon
        published = 4 * power  # its transform is twice the orthonormal one
        p = published / (published.sum(-1, keepdim=True) + epsilon)
        return -(p * torch.log(p + epsilon)).sum(-1) / (math.log(x.shape[-1]) + epsilon)

    def dct(self, x: Tensor, name: str) -> Tensor:
        def operator(y: Tensor) -> Tensor:
            return self.config.dct.gain * (y @ self.c.T * self.w[f"{name}.filter"]) @ self.c

        return self.sub_layer(x, operator, f"{name}.norm")

    def attention(self, x: Tensor, name: str, has_key: Tensor | None = None) -> Tensor:
        """Attend to the tokens where ``has_key`` (B, T) is True; every token also attends to itself."""
        heads, size = self.config.num_attention_heads, self.config.head_size

        def operator(y: Tensor) -> Tensor:
            q = self.linear(y, f"{name}.query")
            k, v = self.linear(y, f"{name}.key_value").chunk(2, -1)
            out = []
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                qh, kh = self.turned(q[..., part]), self.turned(k[..., part])
                products = (qh @ kh.conj().mT).real / math.sqrt(size)
                if has_key is not None:
                    hidden = ~has_key[:, None, :] & ~torch.eye(x.shape[1], dtype=torch.bool)
                    products = products.masked_fill(hidden, -math.inf)
                out.append(causal_softmax(products) @ v[..., part])
            return self.linear(torch.cat(out, -1), f"{name}.output")

        return self.sub_layer(x, operator, f"{name}.norm")

    def turned(self, y: Tensor) -> Tensor:
        """Return channels i and i + size/2 as one complex number, turned by the angle of its position."""
        half = y.shape[-1] // 2
        frequency = self.config.attention.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(y.shape[1], dtype=torch.float64)[:, None] * frequency
        return torch.complex(y[..., :half], y[..., half:]) * torch.polar(torch.ones_like(angle), angle)

    def rbf(self, x: Tensor, name: str) -> Tensor:
        def operator(y: Tensor) -> Tensor:
            angle = y @ self.w[f"{name}.frequencies"] / math.sqrt(self.config.rbf.features)
            phi = torch.cat([angle.cos(), angle.sin()], -1)
            return self.linear(causal_softmax(phi @ phi.mT) @ phi, f"{name}.output")

        return self.sub_layer(x, operator, f"{name}.norm")

    def feed_forward(self, x: Tensor, layer: str) -> Tensor:
        name = f"{layer}.feed_forward"

        def operator(y: Tensor) -> Tensor:
            hidden = self.linear(y, f"{name}.up")
            return self.linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.down")

        return self.sub_layer(x, operator, f"{name}.norm")

    def gate(self, x: Tensor) -> Tensor | float:
        pool = self.config.meta_router.pool
        if pool == "none":
            return 1.0
        if pool == "batch":
            mean = x.mean((0, 1)).expand_as(x)
        else:
            mean = torch.stack([x[:, : t + 1].mean(1) for t in range(x.shape[1])], 1)
        return torch.sigmoid(self.linear(mean, "layers.0.meta_router.gate"))

    def sub_layer(self, x: Tensor, operator, norm: str) -> Tensor:
        if self.config.norm == "pre":
            return x + operator(self.norm(x, norm))
        return self.norm(x + operator(x), norm)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.config.norm_epsilon).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]


def causal_softmax(products: Tensor) -> Tensor:
    later = torch.ones(products.shape[-2:], dtype=torch.bool).triu(1)
    return products.masked_fill(later, -math.inf).softmax(-1)


MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(z: int) -> int:
    """Return a 64-bit number mixed by the finaliser of SplitMix64, in Python's integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def coin(seed: int, layer: int, sample: int, position: int) -> float:
    """Return the random router's number in [0, 1) for a token of a sample."""
    key = splitmix(splitmix(sample + (seed + 1) * GOLDEN & MASK) + position * GOLDEN & MASK)
    return (splitmix(key + (layer + 1) * 0xD1B54A32D192ED03 & MASK) >> 11) * 2.0**-53


def permutation(seed: int, layer: int, channels: int) -> list[int]:
    """Return the order in which the hashed router of a layer sees the channels."""

    def number(channel: int) -> int:
        row = splitmix(layer * 0xD1B54A32D192ED03 + (seed + 1) * GOLDEN & MASK)
        unsigned = splitmix(row + channel * 0x8CB92BA72F3D8DD7 & MASK)
        return unsigned - 2**64 if unsigned >= 2**63 else unsigned

    return sorted(range(channels), key=number)
