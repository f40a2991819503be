"""Continue one text, token by token, by the engine that continues many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megachiar.inference.engine import Engine, Request
from megachiar.inference.sampling import Sampling
from megachiar.model.transformer import ChiarFormer


def generate(model: ChiarFormer, prompt: Sequence[int], max_new_tokens: int, **sampling: Any) -> list[int]:
    """Return the ids that ``stream`` yields: the new ones, without the prompt and without ``eod_id``."""
    return list(stream(model, prompt, max_new_tokens, **sampling))


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
        temperature: as ``Sampling`` has it.
        top_k: as ``Sampling`` has it.
        top_p: as ``Sampling`` has it.
        seed: as ``Sampling`` has it.
        eod_id: end-of-document id, which ends the generation.
        known_ids: as ``Engine`` takes them.
        sample_id: number of the text, which keys random routes. A forward pass over the text takes the same routes if
            it gets the same number, as it does by default.

    Yields:
        The new ids, without the prompt and without ``eod_id``.
    """
    engine = Engine(model, known_ids, most_running=1)
    sampling = Sampling(temperature, top_k, top_p, seed)
    generation = engine.add(Request(prompt, max_new_tokens, sampling, end=eod_id, sample_id=sample_id))
    while generation.finish is None:
        for drawn in engine.step():
            yield drawn.score.token
