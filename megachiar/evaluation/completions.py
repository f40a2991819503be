"""Continue many texts at a time up to their stop strings, shared out among ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megachiar.evaluation.continuations import ALONE, Ranks
from megachiar.evaluation.text_model import TextModel
from megachiar.inference.engine import Engine, Generation, Request
from megachiar.inference.sampling import Sampling

BYTES_OF_A_CHARACTER = 4
"""Tokens that a character may take at most, where each byte has its own."""


class Completion(NamedTuple):
    """A text that is to be continued.

    Attributes:
        prompt: at least one token id.
        most_new_tokens: the largest number of new tokens.
        stops: strings that end the text, none of them empty.
        sampling: settings of the draws.
    """

    prompt: Sequence[int]
    most_new_tokens: int
    stops: Sequence[str] = ()
    sampling: Sampling = Sampling(temperature=0.0)


def complete(
    text_model: TextModel,
    wanted: Sequence[Completion],
    batch_size: int,
    ranks: Ranks = ALONE,
    before_step: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return the text of the new tokens of each completion; a stop string that has ended it is still in it.

    Texts are shared out among the ranks by their numbers, and each is the same for any number of ranks.

    Args:
        text_model: that continues them.
        wanted: what is continued.
        batch_size: texts that are continued at a time.
        ranks: that share the texts.
        before_step: is called with the number of this rank's texts that are done.
    """
    engine = Engine(text_model.model, text_model.known, most_running=batch_size)
    mine = range(ranks.rank, len(wanted), ranks.size)
    running: dict[Generation, int] = {}
    for number in sorted(mine, key=lambda number: (-len(wanted[number].prompt), number)):
        prompt, most, _, sampling = wanted[number]
        running[engine.add(Request(prompt, most, sampling, end=text_model.end))] = number
    found: dict[int, str] = {}
    while running:
        before_step(len(found))
        engine.step()
        for generation, number in list(running.items()):
            is_stopped = _is_stopped(text_model, generation, wanted[number].stops)
            if is_stopped:
                engine.cancel(generation)
            if is_stopped or generation.finish is not None:
                found[number] = text_model.decode(generation.tokens[len(generation.request.prompt) :])
                del running[generation]
    for others in ranks.gather(found) if ranks.size > 1 else ():
        found |= others
    return [found[number] for number in range(len(wanted))]


def _is_stopped(text_model: TextModel, generation: Generation, stops: Sequence[str]) -> bool:
    """Return whether the last new tokens hold a stop string."""
    new = generation.tokens[len(generation.request.prompt) :]
    return any(stop in text_model.decode(new[-(BYTES_OF_A_CHARACTER * len(stop) + 2) :]) for stop in stops)
