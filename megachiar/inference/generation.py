"""Sampling from a model, one token at a time with a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megachiar.model.kv_cache import DecodingCache
from megachiar.model.transformer import ChiarFormer


@torch.inference_mode()
def generate(
    model: ChiarFormer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eod_id: int | None = None,
    known_ids: torch.Tensor | None = None,
) -> list[int]:
    """Continue ``prompt``.

    Args:
        model: in evaluation mode, trained with ``meta_router.pool`` causal or none.
        prompt: at least one token id. Of a prompt longer than the model's longest sequence the end is read.
        max_new_tokens: at most so many.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the samples.
        eod_id: token that ends the text.
        known_ids: bool (V,), which ids the tokenizer has: a model may have more, to fill up its vocabulary, and these
            are never sampled. None: it has all of them.

    Returns:
        The new ids, without the prompt and without ``eod_id``.

    A model that keeps to documents (``data.document_mask``) reads the last one alone.

    Past ``max_sequence_length`` the last half of it is read anew and generation goes on from there.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    longest = model.config.max_sequence_length
    text, new = list(prompt), []
    cache, unread = DecodingCache(), last_document(text[-longest:], model.document_end)
    while len(new) < max_new_tokens:
        if cache.length + len(unread) > longest:
            cache, unread = DecodingCache(), last_document(text[-max(1, longest // 2) :], model.document_end)
        logits = model(torch.tensor([unread], device=device), cache=cache).logits[0, -1].float().cpu()
        token = sample(logits, temperature, top_k, top_p, generator, known_ids)
        if token == eod_id:
            break
        new.append(token)
        text.append(token)
        unread = [token]
        if model.document_end is not None and text[-2] == model.document_end:
            cache = DecodingCache()
    return new


def last_document(text: Sequence[int], end: int | None) -> list[int]:
    """What the last token sees of ``text``: with a model that keeps to documents, those of its own alone."""
    start = len(text) - 1
    while start > 0 and text[start - 1] != end:
        start -= 1
    return list(text[start:]) if end is not None else list(text)


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
    known_ids: torch.Tensor | None = None,
) -> int:
    """Draw one token id from logits (V,), among ``known_ids``, bool (V,), if they are given."""
    if temperature:
        logits = logits / temperature
    if known_ids is not None:
        logits = logits.masked_fill(~known_ids, -torch.inf)
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    if top_p is not None:
        # A token stays while those before it have less than top_p together: the likeliest one always does.
        probabilities = probabilities.masked_fill(probabilities.cumsum(0) - probabilities >= top_p, 0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
