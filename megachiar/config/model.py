"""The section ``model:`` describes the model; the paper (arXiv 2606.08327) has the terms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megachiar.config.section import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Operator = Literal["dct", "rbf", "attention"]
# A threshold is one number for all routed layers, or a list with one for each (layers 2..L-1, in order).
Threshold = Share | Annotated[tuple[Share, ...], Field(strict=False)]


class DctConfig(Section):
    """The orthonormal DCT-II over the channels of one token, and the spectral entropy that is read from it."""

    gain: PositiveFloat = 1.0
    """Factor outside the learned filter: op(x) = gain * C^T diag(w) C x. The published code has 2."""
    entropy_dc_weight: PositiveFloat = 1.0
    """Factor on the zero-frequency bin's power in the spectral entropy. The published code has 2."""
    entropy_epsilon: Annotated[float, Field(ge=0.0, le=1e-3)] = 0.0
    """Added in the entropy to a bin's share of the power inside the logarithm, and to ln d; a quarter of it is added to
    the power that shares are of. The published code has 1e-8, about -d * 1e-8 / ln d on H."""


class RouterConfig(Section):
    """Which operator each token of a routed layer takes."""

    kind: Literal["threshold", "soft", "hard", "random", "hashed", "learned"] = "threshold"
    """threshold: by spectral entropy H against tau. soft: softmax blend of all operators. hard: argmax with a
    straight-through gradient. random: control with a fixed share, a coin for each token: a hash of seed, layer, sample
    and position (with data.document_mask, of the document so far instead of the sample). hashed: control that decides
    by the hidden state as threshold does, but by H of its channels in another order, fixed for each layer. learned: by
    what attention is worth to the token, as a linear head predicts it from the hidden state and H."""
    operators: Annotated[tuple[Operator, ...], Field(strict=False)] = ("dct", "attention")
    """Operators of a routed layer, by rising spectral entropy: [dct, attention] or [dct, rbf, attention]."""
    tau: Threshold | None = None
    """threshold and hashed, two operators: threshold on H in [0, 1], attention where H > tau. One number, or one per
    routed layer. 0 sends every token to attention and 1 every token to DCT mixing, whatever its H."""
    tau_low: Threshold | None = None
    """threshold and hashed, three operators: threshold on H in [0, 1], DCT where H <= tau_low."""
    tau_high: Threshold | None = None
    """threshold and hashed, three operators: threshold on H in [0, 1], attention where H > tau_high, RBF between."""
    attention_share: Share | None = None
    """random: share of tokens sent to attention, which a run comes as near to as independent coins do."""
    rbf_share: Share | None = None
    """random with three operators: share of tokens sent to RBF mixing."""
    target_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """learned, and threshold or hashed with two operators: share of tokens of each routed layer that take attention. A
    threshold of the layer's own follows, step by step, what the router compares, and is saved with the weights. With
    threshold and hashed tau is then where it starts, and may be left out."""
    anneal_steps: Annotated[int, Field(ge=0)] = 0
    """target_share, and random with two operators: steps over which the share of attention falls in equal parts from
    all tokens to target_share (random: attention_share). What only attention can learn is then learned before tokens
    are kept from it. 0 starts with that share. A threshold lags behind, so give it hundreds of steps: over 100 the
    share is up to 0.15 too high, over 1000 up to 0.03."""
    explore: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    """learned: share of tokens for which training computes both operators, to measure what attention is worth there. A
    hash of seed, layer, sample and position chooses them."""
    seed: int = 0
    """random: seed of the coins. hashed: seed of the permutations. learned: seed of the tokens that are explored. The
    run's training.seed changes none of them."""
    hard_gradient: Literal["published", "dct_only"] = "published"
    """hard: the operators whose results the gradient of the gates knows. published: all of them for every token, which
    costs attention for the tokens that take DCT mixing. dct_only: the operator that a token takes, and DCT mixing.
    Gates then learn from the tokens alone that take attention."""
    collapse_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Factor lambda of the collapse regulariser -lambda * U added to the loss; U, in nats, is the entropy of the mean
    operator use."""
    collapse_temperature: PositiveFloat = 0.01
    """threshold and hashed: width in H of the soft gates through which the regulariser gets its gradient (units of H).
    """

    @property
    def has_thresholds(self) -> bool:
        """Whether the router compares H, of the channels as they are or permuted, with thresholds."""
        return self.kind in ("threshold", "hashed")


class AttentionConfig(Section):
    keys: Literal["all", "routed"] = "all"
    """Which tokens of a routed layer give keys and values. all: every token, as published. routed: those that take
    attention. A token sent to DCT mixing then costs attention nothing and takes no room in its cache. Its information
    reaches other tokens through layers that attend to all."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary position embedding, in tokens: pair i of n turns by base^(-i/n) radians a token."""


class RbfConfig(Section):
    features: PositiveInt = 64
    """R, random frequencies: phi(x) of a token has 2R numbers, R cosines and R sines of x W / sqrt(R)."""
    gamma: PositiveFloat = 1.0
    """Factor in the kernel: phi(x) . phi(y) comes near R exp(-gamma |x - y|^2 / R). The frequencies W are drawn with
    variance 2 * gamma, and divided by sqrt(R) as in the published code."""


class MetaRouterConfig(Section):
    """The gate g of layer 1: x <- g * layer1(x) + (1 - g) * x with g = sigmoid(v . mean(x) + b)."""

    pool: Literal["batch", "causal", "none"] = "causal"
    """The tokens that the mean runs over. batch: all tokens of the micro-batch, later ones included, as published:
    training leaks the future into the gate, and logits depend on the other sequences of the batch. causal: the prefix
    of the same sequence. none: no gate, layer 1 is always used."""
    init: Literal["intended", "published"] = "intended"
    """intended: v = 0, b = 2 (g = 0.88). published: v ~ normal(0, initializer_std), b = 0 (g = 0.5)."""


class ModelConfig(Section):
    kind: Literal["chiar", "baseline"] = "chiar"
    """chiar: layer 1 DCT only, layers 2..L-1 routed, layer L attention only. baseline: attention in all
    layers, no gate."""
    num_layers: PositiveInt
    """L, layers of the model."""
    hidden_size: Annotated[int, Field(ge=2)]
    """d, channels of a token."""
    num_attention_heads: PositiveInt
    """Heads of each attention layer; each has hidden_size / num_attention_heads channels."""
    ffn_hidden_size: PositiveInt | None = None
    """Channels inside the feed-forward; 4 * hidden_size when not given."""
    vocab_size: PositiveInt
    """Rows of the embedding. At least the tokenizer's vocabulary; ids above it are never seen."""
    max_sequence_length: PositiveInt
    """Longest sequence in tokens for training and generation."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability that an element is dropped: after the embedding, inside the feed-forward, of attention's weights."""
    norm: Literal["post", "pre"] = "post"
    """post: y = LN(x + op(x)), the paper's. pre: y = x + op(LN(x))."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance of a token's channels under the root of LayerNorm, in units of that variance."""
    initializer_std: PositiveFloat = 0.02
    """Standard deviation of linear and embedding weights at the start; biases start at 0."""
    embedding_multiplier: PositiveFloat = 1.0
    """Factor on the token embedding before layer 1; the tied head has none. With norm pre, 1 / initializer_std gives
    the rows of chiar and of baseline about the same scale at the start."""
    dct: DctConfig = DctConfig()
    router: RouterConfig = RouterConfig()
    attention: AttentionConfig = AttentionConfig()
    rbf: RbfConfig = RbfConfig()
    meta_router: MetaRouterConfig = MetaRouterConfig()

    @property
    def ffn_size(self) -> int:
        """Channels inside the feed-forward."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def routed_layers(self) -> range:
        """The indices, counted from 0, of the layers that route; the baseline has none."""
        return range(1, self.num_layers - 1) if self.kind == "chiar" else range(0)

    @property
    def draws_tokens(self) -> bool:
        """Whether a layer draws routes, or tokens to explore, by keys that the layout of a micro-batch has to hold."""
        return self.router.kind in ("random", "learned") and len(self.routed_layers) > 0

    @property
    def expected_attention_share(self) -> float:
        """Share of a routed layer's tokens that take attention, as far as the config says it, else a guess of one half.

        It is that of a random router, or the one that a running threshold holds; and all where every threshold is 0,
        none where every one is 1.
        """
        router = self.router
        if router.target_share is not None:
            return router.target_share
        if router.kind == "random" and router.attention_share is not None:
            return router.attention_share
        bound = router.tau if len(router.operators) == 2 else router.tau_high
        bounds = set(bound) if isinstance(bound, tuple) else {bound}
        if not router.has_thresholds:
            return 0.5
        return 1.0 if bounds == {0.0} else 0.0 if bounds == {1.0} else 0.5

    def threshold(self, name: Literal["tau", "tau_low", "tau_high"], layer: int) -> float:
        """Return the threshold of the routed layer with index ``layer``, counted from 0 in the whole stack."""
        value: float | tuple[float, ...] = getattr(self.router, name)
        return value[layer - self.routed_layers.start] if isinstance(value, tuple) else value
