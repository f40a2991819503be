"""CHIAR-Former for the library transformers: a language model whose tokens take DCT mixing or attention.

``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`` loads this file from the folder that
``megachiar export --to hf`` has written. It needs torch and transformers, and nothing else of megachiar.

A layer sends each token by a router to one operator, and all tokens to a feed-forward. Source: "Chiaroscuro Attention:
Spending Compute in the Dark", arXiv 2606.08327.

What the cache of ``generate`` holds, for every position of each sequence, in the shape (B, 1, T, channels):

    first layer of a chiar model    token id + 2, or 1 for padding (int64); gates, documents and random routes follow
    layers with attention           keys and values of all heads side by side; then, where the layer has it, the random
                                    features of RBF mixing, and 1 for a token that gives a key (``keys: routed``)
    first layer of a baseline       the same, and 1 for padding, 2 for a token, 3 for the token that ends a document

Shapes: B = sequences, S = tokens of this pass, T = tokens of the cache and of this pass, N = B * S rows, n = rows of
one operator, d = channels, h = heads, c = channels of a head, O = operators, R = frequencies of RBF mixing.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import PretrainedConfig as Config
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput

GOLDEN, MIX = -0x61C8864680B583EB, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
LAYER, CHANNEL = 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7
"""Constants of the hashes by which routes are drawn: those of SplitMix64, and odd factors of layers and channels."""


class ChiarConfig(Config):
    """The configuration of an exported model; ``config.json`` holds it.

    Args:
        kind: chiar (first layer DCT mixing, last layer attention, routers between) or baseline (attention alone).
        norm: post or pre, where LayerNorm stands.
        router: threshold, soft, hard, random, hashed or learned.
        operators: of a routed layer, by rising spectral entropy.
        thresholds: for each routed layer the numbers between its operators; empty for soft and hard.
        thresholds_run: whether a threshold was found by training, and is compared as it is.
        noise: mean and standard deviation of spectral entropy of white noise, by which a learned router scales it.
        keys: all or routed, the tokens of a routed layer that others attend to.
        gate: causal or none, what the first layer's gate averages over.
        document_end: id of the token that ends a document, if no token attends to another document; else None.
        head, padding, classified_length: of a classifier: linear or mlp; masked, or counted up to so many tokens.
        megachiar: what ``megachiar import`` needs besides.
    """

    model_type = "chiar"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  # `Trainer` adds a list to it

    def __init__(
        self,
        kind: str = "chiar",
        vocab_size: int = 50257,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 1024,
        max_position_embeddings: int = 256,
        norm: str = "post",
        norm_epsilon: float = 1e-5,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        embedding_multiplier: float = 1.0,
        rope_base: float = 10000.0,
        dct_gain: float = 1.0,
        entropy_dc_weight: float = 1.0,
        entropy_epsilon: float = 0.0,
        router: str = "threshold",
        operators: tuple[str, ...] = ("dct", "attention"),
        thresholds: tuple[tuple[float, ...], ...] = ((0.8691,), (0.8691,)),
        thresholds_run: bool = False,
        noise: tuple[float, float] = (0.0, 1.0),
        router_seed: int = 0,
        hard_gradient: str = "published",
        keys: str = "all",
        rbf_features: int = 64,
        rbf_gamma: float = 1.0,
        gate: str = "causal",
        document_end: int | None = None,
        head: str = "linear",
        padding: str = "masked",
        classified_length: int | None = None,
        use_cache: bool = True,
        megachiar: dict[str, Any] | None = None,
        **others: Any,
    ):
        own = {name: value for name, value in locals().items() if name not in ("self", "others", "__class__")}
        others.setdefault("tie_word_embeddings", True)
        super().__init__(**others)
        for name, value in own.items():
            setattr(self, name, value)

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def routed_layers(self) -> range:
        """The indices of the layers that route, from 0."""
        return range(1, self.num_hidden_layers - 1) if self.kind == "chiar" else range(0)


def wrap64(number: int) -> int:
    """Return ``number`` modulo 2^64 in the range of int64."""
    return (number + 2**63) % 2**64 - 2**63


def mix64(numbers: torch.Tensor) -> torch.Tensor:
    """Apply the finaliser of SplitMix64 to int64 ``numbers``."""
    for shift, factor in MIX:
        numbers = (numbers ^ ((numbers >> shift) & ((1 << (64 - shift)) - 1))) * wrap64(factor)
    return numbers


def exact(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in fp32, or in fp64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


@functools.lru_cache(maxsize=32)
def dct_matrix(d: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the orthonormal DCT-II ``C`` (d, d): the spectrum of a row x is C x."""
    n = torch.arange(d, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / d * (n + 0.5) * n[:, None]) * math.sqrt(2 / d)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=32)
def rotary_table(length: int, c: int, base: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return cos and [-sin | sin] (2, length, c) of rotary position embedding in its rotate-half form."""
    frequency = base ** (-torch.arange(0, c, 2, dtype=torch.float64, device="cpu") / c)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequency)
    table = torch.stack([torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)])
    return table.to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=32)
def channel_order(seed: int, layer: int, d: int, device: torch.device) -> torch.Tensor:
    """Return the order (d,) in which a hashed router of ``layer`` reads the channels."""
    start = mix64(torch.tensor([wrap64(layer * wrap64(LAYER) + wrap64((seed + 1) * GOLDEN))], device=device))
    return mix64(start + torch.arange(d, device=device) * wrap64(CHANNEL)).argsort()


def spectral(x: torch.Tensor) -> torch.Tensor:
    """Return the spectrum (n, d) of rows (n, d), fp32 or fp64 whatever autocast says: routes depend on it."""
    with torch.autocast(x.device.type, enabled=False):
        wide = exact(x)
        return wide @ dct_matrix(x.shape[-1], x.device, wide.dtype).mT


def spectral_entropy(spectrum: torch.Tensor, config: ChiarConfig) -> torch.Tensor:
    """Return the spectral entropy (n,) of rows with this spectrum (n, d), normalised to [0, 1]."""
    power = spectrum.square()
    if config.entropy_dc_weight != 1:
        power = torch.cat([power[:, :1] * config.entropy_dc_weight, power[:, 1:]], -1)
    total, tiny, epsilon = power.sum(-1, keepdim=True), torch.finfo(power.dtype).tiny, config.entropy_epsilon
    share = power / (total.masked_fill(total == 0, 1) + epsilon / 4)
    entropy = -(share * (share.clamp_min(tiny) + epsilon).log()).sum(-1) / (math.log(spectrum.shape[-1]) + epsilon)
    return entropy if epsilon > 0 else entropy.clamp_min(0)


class Layout(NamedTuple):
    """What a pass knows of its tokens and of those in the cache. Padding may stand on any side.

    Attributes:
        past: number of positions in the cache.
        ids: (B, T) int64 of a chiar model, -1 for padding; of a baseline those of this pass alone.
        is_real: (B, T) bool, false for padding.
        codes: (B, S) what the first layer of a baseline keeps of this pass.
        document: (B, T) int64, how many documents end before the token.
        position: (B, T) int64, how many tokens of the sequence stand before the token.
        mask: (B, 1, S, T) bool, the keys that each token of this pass sees; None if these are all up to itself.
    """

    past: int
    ids: torch.Tensor
    is_real: torch.Tensor
    codes: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    mask: torch.Tensor | None

    @property
    def new_positions(self) -> torch.Tensor:
        """The positions (N,) of the tokens of this pass."""
        return self.position[:, self.past :].flatten()

    @property
    def cache_position(self) -> torch.Tensor:
        """Where this pass stands in the cache: (S,) int64."""
        return torch.arange(self.past, self.is_real.shape[1], device=self.is_real.device)

    def visible(self) -> torch.Tensor:
        """Return ``mask``, made now if it was not needed so far."""
        if self.mask is not None:
            return self.mask
        keys = torch.arange(self.is_real.shape[1], device=self.is_real.device)
        seen = (keys <= self.cache_position[:, None])[None] & self.is_real[:, None]
        return (seen & (self.document[:, None] == self.document[:, self.past :, None]))[:, None]

    def since_document(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of ``values`` (B, T) or (B, T, d) over each document up to every token; padding must be 0."""
        sums, index = values.cumsum(1), torch.arange(values.shape[1], device=values.device)
        opens = F.pad(self.document[:, 1:] != self.document[:, :-1], (1, 0))
        start = (opens * index).cummax(1).values
        if values.dim() == 3:
            start = start[..., None].expand_as(values)
        return sums - (sums - values).gather(1, start)


def length_of(cache: Any) -> int:
    """Return how many positions a cache of transformers holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def lay_out(config: ChiarConfig, ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any) -> Layout:
    """Return the layout of a pass over ``ids`` (B, S); it adds them to the cache of a chiar model.

    Raises:
        ValueError: ``attention_mask`` is not of the shape (B, T).
    """
    past, length = length_of(cache), ids.shape[1]
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions: give one of (sequences, tokens)")
    is_real = torch.ones_like(ids, dtype=torch.bool)
    if attention_mask is not None:
        is_real = attention_mask[:, -length:].bool()
    end = -2 if config.document_end is None else config.document_end  # -2 is no id, and no padding
    is_end = is_real & (ids == end)
    codes = is_real.long() + is_end + 1
    if config.kind == "chiar":
        stored = torch.where(is_real, ids + 2, 1)[:, None, :, None]
        ids = remember(cache, 0, stored, stored, past)[0][:, 0, :, 0] - 2
        is_real, is_end = ids >= 0, ids == end
    elif past:
        before = cache.layers[0].keys[:, 0, :past, -1].round().long()
        is_real = torch.cat([before > 1, is_real], 1)
        is_end = torch.cat([before == 3, is_end], 1)
    layout = Layout(
        past=past,
        ids=ids,
        is_real=is_real,
        codes=codes,
        document=is_end.cumsum(1) - is_end.long(),
        position=(is_real.cumsum(1) - 1).clamp_min(0),
        mask=None,
    )
    plain = (length == 1 or not past) and bool(is_real.all()) and not bool(layout.document.any())
    return layout if plain else layout._replace(mask=layout.visible())


def remember(
    cache: Any, layer: int, keys: torch.Tensor, values: torch.Tensor, past: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add keys and values (B, 1, S, channels) of ``layer`` to a cache, if there is one, and return all: (B, 1, T, ...).

    A static cache has room for more positions, which are cut off.
    """
    if cache is None:
        return keys, values
    end = past + keys.shape[2]
    where = {"cache_position": torch.arange(past, end, device=keys.device)}
    keys, values = cache.update(keys, values, layer, where)
    return keys[:, :, :end], values[:, :, :end]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float, scale: float | None
) -> torch.Tensor:
    """Return attention (B, h, S, c) of queries (B, h, S, c) to keys and values (B, h, T, c); see ``Layout.mask``."""
    if mask is not None:  # padding sees nothing: it gets the mean of the values, which nobody reads
        mask = mask | ~mask.any(-1, keepdim=True)
    is_causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, scale=scale)


class Remembered(NamedTuple):
    """What the operators of a layer read of all tokens.

    Attributes:
        keys, values: (B, 1, T, d), of attention.
        features: (B, 1, T, 2R), of RBF mixing; None without it.
        mask: for attention, see ``Layout.mask``.
        queries: (N, 2R) features of this pass; None without RBF mixing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    features: torch.Tensor | None
    mask: torch.Tensor | None
    queries: torch.Tensor | None


class Attention(nn.Module):
    """Self-attention with queries of some rows: LN(x + attention(x)), or x + attention(LN(x)) with norm pre."""

    def __init__(self, config: ChiarConfig):
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.query, self.key_value, self.output = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.norm = nn.LayerNorm(d, eps=config.norm_epsilon)

    def keys_and_values(self, x: torch.Tensor, positions: torch.Tensor, length: int) -> list[torch.Tensor]:
        """Return rotated keys and values (n, d) each of rows (n, d) at ``positions`` (n,) below ``length``."""
        keys, values = self.key_value(self._normed(x)).chunk(2, -1)
        return [self._rotated(keys, positions, length), values]

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None, layout: Layout, seen: Remembered) -> torch.Tensor:
        """Compute the sub-layer (n, d) for the rows at ``rows`` (n,) of ``x`` (N, d), or for all if that is None."""
        taken, positions = (x, layout.new_positions) if rows is None else (x[rows], layout.new_positions[rows])
        q = self._rotated(self.query(self._normed(taken)), positions, layout.is_real.shape[1])
        q = spread(q, rows, len(x)).view(len(layout.is_real), -1, q.shape[1])
        heads = (self.config.num_attention_heads, self.config.head_dim)
        q, k, v = (y.unflatten(-1, heads).transpose(1, 2) for y in (q, seen.keys[:, 0], seen.values[:, 0]))
        dropout = self.config.dropout if self.training else 0.0
        mixed = attend(q, k, v, seen.mask, dropout, None).transpose(1, 2).reshape(x.shape)
        result = taken + self.output(mixed if rows is None else mixed[rows])
        return result if self.config.norm == "pre" else self.norm(result)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if self.config.norm == "pre" else x

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Rotate rows (n, d) by their positions (n,)."""
        config, longest = self.config, max(self.config.max_position_embeddings, length)
        table = rotary_table(longest, config.head_dim, config.rope_base, x.device, x.dtype)
        cos, sin = table[0][positions][:, None], table[1][positions][:, None]
        heads = x.unflatten(-1, (config.num_attention_heads, config.head_dim))
        first, second = heads.chunk(2, -1)
        return (heads * cos + torch.cat([second, first], -1) * sin).flatten(1)


def spread(x: torch.Tensor, rows: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return ``count`` rows of zeros but for ``x`` (n, ...) at the indices ``rows`` (n,); ``x`` if that is None."""
    return x if rows is None else x.new_zeros(count, *x.shape[1:]).index_copy(0, rows, x)


class DctMixing(nn.Module):
    """A learned filter over the spectrum of one token: LN(x + C^T diag(w) C x), or with LN before it (norm pre)."""

    def __init__(self, config: ChiarConfig):
        super().__init__()
        self.config = config
        self.filter = nn.Parameter(torch.ones(config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(self, x: torch.Tensor, spectrum: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the sub-layer for rows (n, d), whose ``spectrum`` (n, d) may be known."""
        is_pre = self.config.norm == "pre"
        if is_pre or spectrum is None:
            spectrum = spectral(self.norm(x) if is_pre else x)
        with torch.autocast(x.device.type, enabled=False):
            filtered = spectrum * (self.config.dct_gain * self.filter.to(spectrum.dtype))
            mixed = filtered @ dct_matrix(x.shape[-1], x.device, spectrum.dtype)
        result = x + mixed.to(x.dtype)
        return result if is_pre else self.norm(result)


class RbfMixing(nn.Module):
    """The mean of random Fourier features of earlier tokens, weighted by their similarity (the paper's ablation)."""

    frequencies: torch.Tensor

    def __init__(self, config: ChiarConfig):
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", torch.zeros(config.hidden_size, config.rbf_features))
        self.output = nn.Linear(2 * config.rbf_features, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features (N, 2R) of rows (N, d)."""
        x = self.norm(x) if self.config.norm == "pre" else x
        angle = x @ self.frequencies.to(x.dtype) / math.sqrt(self.config.rbf_features)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None, layout: Layout, seen: Remembered) -> torch.Tensor:
        """Compute the sub-layer (n, d) for the rows at ``rows`` (n,) of ``x`` (N, d), or for all if that is None."""
        assert seen.queries is not None and seen.features is not None
        q = seen.queries.view(len(layout.is_real), 1, -1, seen.queries.shape[1])
        dropout = self.config.dropout if self.training else 0.0
        mixed = attend(q, seen.features, seen.features, layout.mask, dropout, 1.0).reshape(len(x), -1)
        taken, mixed = (x, mixed) if rows is None else (x[rows], mixed[rows])
        result = taken + self.output(mixed)
        return result if self.config.norm == "pre" else self.norm(result)


class FeedForward(nn.Module):
    """LN(y + W2 gelu(W1 y)), or y + W2 gelu(W1 LN(y)) with norm pre."""

    def __init__(self, config: ChiarConfig):
        super().__init__()
        self.config = config
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Compute the sub-layer for rows (N, d)."""
        is_pre, dropout = self.config.norm == "pre", self.config.dropout
        inner = F.dropout(F.gelu(self.up(self.norm(y) if is_pre else y)), dropout, self.training)
        result = y + F.dropout(self.down(inner), dropout, self.training)
        return result if is_pre else self.norm(result)


class Decision(NamedTuple):
    """What a router decides about rows.

    Attributes:
        route: (N,) int64, the operator of each row.
        gates: (N, O) with gradient, of soft and hard routers; else None.
        spectrum: (N, d) of the rows.
    """

    route: torch.Tensor
    gates: torch.Tensor | None
    spectrum: torch.Tensor


class Router(nn.Module):
    """The router of a layer. Fine-tuning trains the gates of soft and hard routers; the others stay as they are."""

    def __init__(self, config: ChiarConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.kind = config.router
        self.bounds = tuple(config.thresholds[layer - 1]) if config.thresholds else ()
        if self.kind in ("soft", "hard"):
            self.gate = nn.Linear(config.hidden_size + 1, len(config.operators))
        if self.kind == "learned":
            self.value_head = nn.Linear(config.hidden_size + 1, 1)

    def forward(self, x: torch.Tensor, layout: Layout) -> Decision:
        """Decide about rows ``x`` (N, d)."""
        spectrum = spectral(x)
        if self.kind in ("soft", "hard"):
            entropy = spectral_entropy(spectrum, self.config)[:, None].to(x.dtype)
            gates = F.softmax(exact(self.gate(torch.cat([x, entropy], -1))), -1)
            return Decision(gates.argmax(-1), gates, spectrum)
        with torch.no_grad():
            return Decision(self._by_thresholds(self._score(x, spectrum, layout)), None, spectrum)

    def _score(self, x: torch.Tensor, spectrum: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return the numbers (N,) that thresholds are compared with."""
        if self.kind == "random":
            keys = random_keys(self.config, layout)[:, layout.past :].flatten()
            numbers = mix64(keys + wrap64((self.layer + 1) * LAYER))
            return ((numbers >> 11) & (2**53 - 1)).double() * 2.0**-53
        if self.kind == "hashed":
            order = channel_order(self.config.router_seed, self.layer, x.shape[1], x.device)
            return spectral_entropy(spectral(x[:, order]), self.config)
        entropy = spectral_entropy(spectrum, self.config)
        if self.kind == "threshold":
            return entropy
        with torch.autocast(x.device.type, enabled=False):
            mean, deviation = self.config.noise
            rows = F.layer_norm(exact(x), x.shape[1:])
            weight = exact(self.value_head.weight)
            features = torch.cat([rows, ((entropy - mean) / deviation)[:, None]], 1) * x.shape[1] ** -0.5
            length = weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)
            return F.linear(features, weight)[:, 0] * (x.shape[1] ** 0.5 / length)

    def _by_thresholds(self, score: torch.Tensor) -> torch.Tensor:
        """Return the operator (N,) of each score: the first up to the first threshold, the last above the last one."""
        if self.config.thresholds_run:
            return (score > self.bounds[0]).long()
        route = torch.zeros_like(score, dtype=torch.int64)
        for bound in self.bounds:
            if bound <= 0:
                route += 1
            elif bound < 1:
                route += score > bound
        return route


def random_keys(config: ChiarConfig, layout: Layout) -> torch.Tensor:
    """Return the keys (B, T) int64 by which random routes are drawn.

    They are the document up to the token where ``document_end`` keeps documents apart; else the position in the
    sequence, which counts as number 0, as in ``megachiar generate``.
    """
    seed = wrap64((config.router_seed + 1) * GOLDEN)
    if config.document_end is None:
        number = torch.tensor([seed], device=layout.ids.device)
        return mix64(mix64(number) + layout.position * GOLDEN)
    place = layout.since_document(layout.is_real.long())
    numbers = mix64(mix64(layout.ids) + place * GOLDEN).masked_fill(~layout.is_real, 0)
    return mix64(layout.since_document(numbers) + seed)


class MetaRouter(nn.Module):
    """The gate of the first layer: sigmoid(v . m + b), where m is the mean of the document up to the token."""

    def __init__(self, config: ChiarConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 1)

    def forward(self, embedded: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return the gates (N, 1) of this pass from the embedded tokens (B, T, d) of the cache and of this pass."""
        wide = exact(embedded) * layout.is_real[..., None]
        count = layout.since_document(layout.is_real.long()).clamp_min(1)
        sums = layout.since_document(wide) if bool(layout.document.any()) else wide.cumsum(1)
        mean = (sums / count[..., None])[:, layout.past :].flatten(0, 1)
        return torch.sigmoid(self.gate(mean.to(embedded.dtype)))


class FixedLayer(nn.Module):
    """A layer whose rows all take one operator: DCT mixing with a gate (the first of chiar), or attention."""

    def __init__(self, config: ChiarConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.is_dct = config.kind == "chiar" and index == 0
        self.meta_router = MetaRouter(config) if self.is_dct and config.gate != "none" else None
        self.operator: Any = DctMixing(config) if self.is_dct else Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, layout: Layout, cache: Any, embedded: torch.Tensor) -> torch.Tensor:
        """Run the layer for rows ``x`` (N, d); ``embedded`` (B, T, d) are the tokens that a gate averages over."""
        if self.is_dct:
            y = self.feed_forward(self.operator(x))
            if self.meta_router is None:
                return y
            gate = self.meta_router(embedded, layout)
            return gate * y + (1 - gate) * x
        kept = self.operator.keys_and_values(x, layout.new_positions, layout.is_real.shape[1])
        if self.index == 0:
            kept = [torch.cat([y, layout.codes.flatten()[:, None].to(y.dtype)], 1) for y in kept]
        kept = [y.view(len(layout.is_real), 1, -1, y.shape[1]) for y in kept]
        keys, values = remember(cache, self.index, kept[0], kept[1], layout.past)
        d = self.config.hidden_size
        seen = Remembered(keys[..., :d], values[..., :d], None, layout.mask, None)
        return self.feed_forward(self.operator(x, None, layout, seen))


class RoutedLayer(nn.Module):
    """A layer whose router chooses an operator for each row, which alone computes it."""

    def __init__(self, config: ChiarConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.router = Router(config, index)
        self.attention, self.dct = Attention(config), DctMixing(config)
        self.rbf = RbfMixing(config) if "rbf" in config.operators else None
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, layout: Layout, cache: Any, embedded: torch.Tensor) -> torch.Tensor:
        """Run the layer for rows ``x`` (N, d); ``embedded`` is not used."""
        decision = self.router(x, layout)
        seen = self._remember(x, decision.route, layout, cache)
        if decision.gates is not None and self.config.router == "soft":
            y = torch.zeros_like(x)
            for index, gate in enumerate(decision.gates.to(x.dtype).unbind(-1)):
                y = y + gate[:, None] * self._operate(index, x, None, decision, layout, seen)
            return self.feed_forward(y)
        y = torch.zeros_like(x)
        for index in range(len(self.config.operators)):
            rows = torch.nonzero(decision.route == index).flatten()
            if len(rows) or self.training:  # in training all parameters get a gradient
                y = y.index_copy(0, rows, self._operate(index, x, rows, decision, layout, seen))
        if decision.gates is not None and decision.gates.requires_grad:
            y = self._with_gradient_of_gates(y, x, decision, layout, seen)
        return self.feed_forward(y)

    def _remember(self, x: torch.Tensor, route: torch.Tensor, layout: Layout, cache: Any) -> Remembered:
        """Return what the operators read of all tokens, and add that of this pass to the cache."""
        d, is_routed, kept = self.config.hidden_size, self.config.keys == "routed", []
        gives = route == len(self.config.operators) - 1
        rows = torch.nonzero(gives).flatten() if is_routed else None
        taken, positions = (x, layout.new_positions) if rows is None else (x[rows], layout.new_positions[rows])
        kept = self.attention.keys_and_values(taken, positions, layout.is_real.shape[1])
        kept = [spread(y, rows, len(x)) for y in kept]
        queries = self.rbf.features(x) if self.rbf is not None else None
        if queries is not None:
            kept = [torch.cat(pair, 1) for pair in zip(kept, queries.chunk(2, 1), strict=True)]
        if is_routed:
            kept = [torch.cat([y, gives[:, None].to(y.dtype)], 1) for y in kept]
        kept = [y.view(len(layout.is_real), 1, -1, y.shape[1]) for y in kept]
        keys, values = remember(cache, self.index, kept[0], kept[1], layout.past)
        features, mask = None, layout.mask
        if queries is not None:
            end = d + self.config.rbf_features
            features = torch.cat([keys[..., d:end], values[..., d:end]], -1)
        if is_routed:
            mask = layout.visible() & (keys[..., -1] > 0.5)[:, :, None]
        return Remembered(keys[..., :d], values[..., :d], features, mask, queries)

    def _operate(
        self,
        index: int,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        decision: Decision,
        layout: Layout,
        seen: Remembered,
    ) -> torch.Tensor:
        """Compute operator ``index`` for the rows at ``rows`` (n,) of ``x`` (N, d), or for all if that is None."""
        name = self.config.operators[index]
        if name == "dct":
            taken, spectrum = (x, decision.spectrum) if rows is None else (x[rows], decision.spectrum[rows])
            return self.dct(taken, spectrum)
        operator: Any = self.attention if name == "attention" else self.rbf
        return operator(x, rows, layout, seen)

    def _with_gradient_of_gates(
        self, y: torch.Tensor, x: torch.Tensor, decision: Decision, layout: Layout, seen: Remembered
    ) -> torch.Tensor:
        """Return ``y`` with the straight-through gradient of a hard router's gates: that of the sum of gate * result.

        Results of operators that a row did not take are constants. With ``hard_gradient: dct_only`` only DCT mixing is
        compared, and only by rows that took another operator.
        """
        assert decision.gates is not None
        route, count = decision.route, len(self.config.operators)
        change = (decision.gates - decision.gates.detach()).to(y.dtype)  # zeros
        if self.config.hard_gradient == "dct_only":
            count, change = 1, change * (route > 0)[:, None]
        y = y * (1 + change.gather(-1, route[:, None]))
        for index in range(count):
            rows = torch.nonzero(route != index).flatten()
            with torch.no_grad():
                result = self._operate(index, x, rows, decision, layout, seen)
            y = y.index_add(0, rows, change[rows, index, None] * result)
        return y


class ChiarPreTrainedModel(PreTrainedModel):
    """What all models here share: names, and how new weights are drawn."""

    config_class = ChiarConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("FixedLayer", "RoutedLayer")
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = True
    _can_compile_fullgraph = False

    def _init_weights(self, module: nn.Module) -> None:
        spread_of_weights = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=spread_of_weights)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, DctMixing):
            nn.init.ones_(module.filter)
        elif isinstance(module, RbfMixing):
            nn.init.normal_(module.frequencies, std=math.sqrt(2 * self.config.rbf_gamma))
        elif isinstance(module, MetaRouter):
            nn.init.zeros_(module.gate.weight)
            nn.init.constant_(module.gate.bias, 2.0)


def with_cache(output: type, cache: Any, **fields: Any) -> Any:
    """Return an output of transformers that holds ``cache`` under the name that this version of it has."""
    names = output.__dataclass_fields__  # type: ignore[attr-defined]
    return output(**{"cache" if "cache" in names else "past_key_values": cache}, **fields)


class ChiarModel(ChiarPreTrainedModel):
    """Embedding, layers and a final LayerNorm."""

    def __init__(self, config: ChiarConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        routed = config.routed_layers
        self.layers = nn.ModuleList(
            (RoutedLayer if index in routed else FixedLayer)(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding, whose weight is the head's too."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.embedding = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> Any:
        """Compute the final hidden states (B, S, d).

        Args:
            input_ids: (B, S).
            attention_mask: (B, T), 0 for padding, which may stand on any side; None where there is none.
            position_ids: (B, S); they must be those that the mask says.
            past_key_values, cache: the cache of earlier positions, by its older and newer name.
            inputs_embeds: refused, since routes and gates depend on ids.
            use_cache: whether to make a cache if there is none; None takes the config's outside of training.
            output_hidden_states: whether to return the hidden states after the embedding and each layer.
            others: not used.

        Raises:
            ValueError: there are no ids, or positions that this model does not have.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("CHIAR-Former reads input_ids, not inputs_embeds: its routes and gates depend on ids")
        cache = cache if cache is not None else past_key_values
        keeps = self.config.use_cache and not self.training if use_cache is None else use_cache
        if keeps and cache is None:
            cache = DynamicCache()
        layout = lay_out(self.config, input_ids, attention_mask, cache)
        if position_ids is not None:
            known, real = layout.position[:, layout.past :], layout.is_real[:, layout.past :]
            if not torch.equal(position_ids.expand_as(known)[real], known[real]):
                raise ValueError("position_ids are not those of the attention mask: leave them out")
        factor, dropout = self.config.embedding_multiplier, self.config.dropout if self.training else 0.0
        x = F.dropout(self.embedding(input_ids) * factor, dropout, self.training)
        embedded = self.embedding(layout.ids.clamp_min(0)) * factor if layout.past else x
        x, states = x.flatten(0, 1), []
        for layer in self.layers:
            states.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, layout, None, embedded)
            else:
                x = layer(x, layout, cache, embedded)
        shown = None
        if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
            shown = tuple(state.view(*input_ids.shape, -1) for state in (*states, x))
        result = self.norm(x).view(*input_ids.shape, -1)
        return with_cache(BaseModelOutputWithPast, cache, last_hidden_state=result, hidden_states=shown)


class ChiarForCausalLM(ChiarPreTrainedModel, GenerationMixin):
    """The language model: logits by the weight of the embedding."""

    def __init__(self, config: ChiarConfig):
        super().__init__(config)
        self.model = ChiarModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **others: Any,
    ) -> Any:
        """Compute logits (B, S, V), or those of the last ``logits_to_keep`` tokens, and the loss of ``labels`` (B, S).

        A label is the id at its own position, -100 for none; the loss is that of predicting it from the tokens before
        it. Other arguments are those of ``ChiarModel``.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = F.linear(output.last_hidden_state[:, kept], self.model.embedding.weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **others)
        held = output["cache"] if "cache" in output else output.get("past_key_values")
        result = with_cache(CausalLMOutputWithPast, held, loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next pass: the ids that the cache does not hold yet, and the whole mask.

        By the name of ``kwargs`` the library knows that ``generate`` takes all arguments of ``forward``.
        """
        cache = cache if cache is not None else past_key_values
        inputs = {"input_ids": input_ids[:, length_of(cache) :], "attention_mask": attention_mask}
        name = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
        return inputs | {name: cache, "use_cache": kwargs.get("use_cache"), "logits_to_keep": 1}


class ClassificationHead(nn.Module):
    """Logits of classes for pooled hidden states."""

    def __init__(self, config: ChiarConfig):
        super().__init__()
        self.dropout = config.dropout
        if config.head == "mlp":
            self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) of pooled hidden states (B, d)."""
        if hasattr(self, "hidden"):
            pooled = F.dropout(F.gelu(self.hidden(pooled)), self.dropout, self.training)
        return self.output(pooled)


class ChiarForSequenceClassification(ChiarPreTrainedModel):
    """A classifier of whole sequences, by the mean of their final hidden states."""

    def __init__(self, config: ChiarConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ChiarModel(config)
        self.classifier = ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Compute logits (B, C) of sequences (B, S), and the loss of ``labels``.

        The loss is the library's: the mean cross-entropy of ``labels`` (B,) of classes, -100 for none; of one class the
        squared error, and of labels (B, C) that of each class by itself. ``Trainer`` says in ``others`` how many
        labels all micro-batches of a step have.

        With ``padding: counted`` every sequence is filled up with token 0 to ``classified_length``, as in training.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if self.config.padding == "counted":
            longest = max(self.config.classified_length or 0, input_ids.shape[1])
            first = real.long().argsort(dim=1, descending=True, stable=True)  # real tokens before padding
            input_ids = F.pad((input_ids * real).gather(1, first), (0, longest - input_ids.shape[1]))
            real = torch.ones_like(input_ids, dtype=torch.bool)
        output = self.model(
            input_ids, attention_mask=real.long(), use_cache=False, output_hidden_states=output_hidden_states
        )
        sums = (exact(output.last_hidden_state) * real[..., None]).sum(1)
        logits = self.classifier((sums / real.sum(1, keepdim=True).clamp_min(1)).to(output.last_hidden_state.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=exact(logits), config=self.config, **others)
            count = others.get("num_items_in_batch")
            if count is not None and self.config.problem_type != "single_label_classification":
                loss = loss * labels.numel() / count  # the library counts for cross-entropy alone
        result = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result.to_tuple() if return_dict is False else result
