"""Score how likely a model finds continuations of texts: many of them, in batches of similar length.

    context  7 3 9   continuation  4 2      the model reads   7 3 9 4
                                            and is scored on        4 2

A text that is longer than the model reads loses its beginning. Requests that read the same tokens share a row, such as
one-token answers to the same question. Texts are padded on their right, which a causal model does not see.

Shapes: B = texts of a batch, T = tokens of its longest text, V = vocabulary size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from megachiar.model.transformer import ChiarFormer


class Continuation(NamedTuple):
    """Token ids of a text, of which the last ones are scored.

    Attributes:
        context: at least one id.
        tokens: the ids that are scored: at least one, and at most as many as the model reads.
    """

    context: Sequence[int]
    tokens: Sequence[int]


class ContinuationScore(NamedTuple):
    """What a model says of a continuation.

    Attributes:
        logprob: natural logarithm of its probability.
        is_greedy: whether each of its tokens is the likeliest one.
    """

    logprob: float
    is_greedy: bool


class Ranks(NamedTuple):
    """The data-parallel ranks that share the work. Each of them calls with the same requests, and gets all results.

    Attributes:
        rank: number of this rank.
        size: number of the ranks.
        gather: returns what each rank gives, in their order; every rank calls it.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


ALONE = Ranks()


class _Row(NamedTuple):
    """A text that is read once, with the numbers of the requests that it answers."""

    tokens: tuple[int, ...]
    requests: list[int]


@torch.inference_mode()
def score_continuations(
    model: ChiarFormer,
    requests: Sequence[Continuation],
    batch_size: int,
    ranks: Ranks = ALONE,
    before_batch: Callable[[int], None] = lambda done: None,
) -> list[ContinuationScore]:
    """Score continuations.

    The batches are the same for any number of ranks, and so are the scores.

    Args:
        model: in evaluation mode; what it says of a token depends on no later one.
        requests: what is scored.
        batch_size: texts that one forward pass reads.
        ranks: that share the batches.
        before_batch: is called with the number of requests that are done.
    """
    rows = _rows(requests, model.config.max_sequence_length)
    found: dict[int, ContinuationScore] = {}
    done = 0
    for number, first in enumerate(range(0, len(rows), batch_size)):
        batch = rows[first : first + batch_size]
        before_batch(done)
        if number % ranks.size == ranks.rank:
            found |= _score_batch(model, batch, requests)
        done += sum(len(row.requests) for row in batch)
    for others in ranks.gather(found) if ranks.size > 1 else ():
        found |= others
    return [found[number] for number in range(len(requests))]


def _rows(requests: Sequence[Continuation], longest: int) -> list[_Row]:
    """Return what is read for the requests, the longest first; the last token of a text is scored, and not read."""
    readers: dict[tuple[int, ...], list[int]] = {}
    for number, (context, tokens) in enumerate(requests):
        text = (*context, *tokens)[-(longest + 1) : -1]
        readers.setdefault(text, []).append(number)
    rows = [_Row(text, numbers) for text, numbers in readers.items()]
    return sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))


def _score_batch(
    model: ChiarFormer, batch: Sequence[_Row], requests: Sequence[Continuation]
) -> dict[int, ContinuationScore]:
    """Return the score of each request by its number."""
    device = next(model.parameters()).device
    tokens = torch.zeros(len(batch), len(batch[0].tokens), dtype=torch.int64)
    for number, row in enumerate(batch):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
    # Each text is number 0, as `generate` counts it: random routes depend on the text's tokens and positions alone.
    logits = model(tokens.to(device), sample_ids=torch.zeros(len(batch), dtype=torch.int64, device=device)).logits
    found = {}
    for row, of_row in zip(batch, logits, strict=True):
        for number in row.requests:
            wanted = torch.tensor(list(requests[number].tokens), device=device)
            end = len(row.tokens)
            scored = of_row[end - len(wanted) : end].float()  # (tokens of the continuation, V)
            logprobs = torch.log_softmax(scored, -1).gather(1, wanted[:, None])
            is_greedy = bool((scored.argmax(-1) == wanted).all())
            found[number] = ContinuationScore(logprobs.sum().item(), is_greedy)  # in fp32, as the harness's hf model
    return found
