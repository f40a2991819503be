"""Draw the next token of a text from logits, and score it.

Shape: V = vocabulary size of the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""The smallest number that fp32 divides by as by any other; below it sampling takes the likeliest token."""


class Sampling(NamedTuple):
    """The settings of the draws of one text.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens; None for all.
        top_p: sample among the likeliest tokens that together have this probability; None for all.
        seed: of the random draws.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class TokenScore(NamedTuple):
    """What a model says of a token of a text.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability, at temperature 1 and among all tokens; None for the first token
            of a text, and where no score was asked for.
        top: ids of the likeliest tokens there with their logprobs, the likeliest first; as many as were asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
    known_ids: torch.Tensor | None = None,
) -> int:
    """Draw one token id.

    Args:
        logits: fp32 (V,).
        temperature: as ``Sampling`` has it.
        top_k: as ``Sampling`` has it.
        top_p: as ``Sampling`` has it.
        generator: of the random draw.
        known_ids: ids that may be drawn, bool (V,); None allows all.
    """
    if known_ids is not None:
        logits = logits.masked_fill(~known_ids, -torch.inf)
    if temperature < SMALLEST_TEMPERATURE:
        return int(logits.argmax())
    # The largest becomes 0 first: a small temperature makes no infinity of it, of which softmax makes NaN.
    logits = (logits - logits.max()) / temperature
    if known_ids is not None:  # an infinite temperature makes NaN of them
        logits = logits.masked_fill(~known_ids, -torch.inf)
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    if top_p is not None:
        # A token stays if the likelier ones together have less than top_p, so that the likeliest one always stays.
        probabilities = probabilities.masked_fill(probabilities.cumsum(0) - probabilities >= top_p, 0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def score(logits: torch.Tensor, token: int, top: int, known_ids: torch.Tensor | None = None) -> TokenScore:
    """Score a token.

    Args:
        logits: fp32 (V,), from which it was drawn.
        token: its id.
        top: how many of the likeliest tokens are named.
        known_ids: ids that may be named, bool (V,); None allows all.
    """
    logprobs = torch.log_softmax(logits, -1)
    named = logprobs if known_ids is None else logprobs.masked_fill(~known_ids, -torch.inf)
    likeliest = named.topk(min(top, len(named)))
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return TokenScore(token, logprobs[token].item(), tuple(pairs))
