"""Sample from a model, one token at a time, with a cache of earlier positions where the model allows one.

Shape: V = vocabulary size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megachiar.model.kv_cache import DecodingCache
from megachiar.model.transformer import ChiarFormer


def generate(model: ChiarFormer, prompt: Sequence[int], max_new_tokens: int, **sampling: Any) -> list[int]:
    """Return the ids that ``stream`` yields: the new ones, without the prompt and without ``eod_id``."""
    return list(stream(model, prompt, max_new_tokens, **sampling))


@torch.inference_mode()
def stream(
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
    sample_id: int = 0,
) -> Iterator[int]:
    """Generate tokens that continue ``prompt``, each as soon as it is drawn. A token takes one forward pass.

    A model that was trained with ``data.document_mask`` reads only the last document of the text. When the text exceeds
    the model's ``max_sequence_length``, the model reads the last half of that length again with an empty cache, and
    generation continues from there.

    With ``meta_router.pool: batch`` the gate of earlier positions changes with every token. Such a model reads the last
    ``max_sequence_length`` tokens anew for each one, as the published code does.

    Args:
        model: in evaluation mode.
        prompt: at least one token id. Only the last ``max_sequence_length`` ids of a longer prompt are read.
        max_new_tokens: largest number of tokens to generate.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the random draws.
        eod_id: end-of-document id, which ends the generation.
        known_ids: ids that the tokenizer has, bool (V,). A model may have more ids, which pad its vocabulary and are
            never sampled. None means that the tokenizer has all of them.
        sample_id: number of the text, which keys random routes. A forward pass over the text takes the same routes if
            it gets the same number, as it does by default.

    Yields:
        The new ids, without the prompt and without ``eod_id``.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    longest = model.config.max_sequence_length
    text = list(prompt)
    number = torch.tensor([sample_id], device=device)
    is_cached = can_cache(model)
    cache, unread = DecodingCache(), last_document(text[-longest:], model.document_end)
    for _ in range(max_new_tokens):
        if not is_cached:
            unread = last_document(text[-longest:], model.document_end)
        elif cache.length + len(unread) > longest:
            cache, unread = DecodingCache(), last_document(text[-max(1, longest // 2) :], model.document_end)
        tokens = torch.tensor([unread], device=device)
        output = model(tokens, sample_ids=number, cache=cache if is_cached else None)
        logits = output.logits[0, -1].float().cpu()
        token = sample(logits, temperature, top_k, top_p, generator, known_ids)
        if token == eod_id:
            return
        yield token
        text.append(token)
        unread = [token]
        if model.document_end is not None and text[-2] == model.document_end:
            cache = DecodingCache()


def can_cache(model: ChiarFormer) -> bool:
    """Return whether hidden states of earlier positions stay as they are when a token is added."""
    config = model.config
    return config.kind == "baseline" or config.meta_router.pool != "batch"


SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""The smallest number that fp32 divides by as by any other; below it sampling takes the likeliest token."""


def last_document(text: Sequence[int], end: int | None) -> list[int]:
    """Return the ids of ``text`` that its last token attends to: all, or those of its document if ``end`` ends one."""
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
    """Draw one token id.

    Args:
        logits: fp32 (V,).
        temperature: as ``generate`` takes it.
        top_k: as ``generate`` takes it.
        top_p: as ``generate`` takes it.
        generator: of the random draw.
        known_ids: ids that may be drawn, bool (V,); None allows all.
    """
    allowed = torch.ones_like(logits, dtype=torch.bool) if known_ids is None else known_ids
    if temperature < SMALLEST_TEMPERATURE:
        return int(logits.masked_fill(~allowed, -torch.inf).argmax())
    # The largest becomes 0 first: a small temperature makes no infinity of it, of which softmax makes NaN.
    logits = ((logits - logits[allowed].max()) / temperature).masked_fill(~allowed, -torch.inf)
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    if top_p is not None:
        # A token stays if the likelier ones together have less than top_p, so that the likeliest one always stays.
        probabilities = probabilities.masked_fill(probabilities.cumsum(0) - probabilities >= top_p, 0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
