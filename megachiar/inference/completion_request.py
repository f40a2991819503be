"""Read a request of OpenAI's completions protocol, and name the field that is wrong with it."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.errors import UserError
from megachiar.inference.sampling import Sampling
from megachiar.request_fields import Setting, read_number

MOST_STOPS = 4
LONGEST_STOP = 200
"""Characters of a stop string."""
MOST_LOGPROBS = 20
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
}
"""Fields of the protocol that are not served, with the values that ask for nothing."""
FIELDS = (
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "echo",
    "user",
    *NEUTRAL,
)


class CompletionLimits(NamedTuple):
    """How much one request may ask for.

    Attributes:
        most_prompt_tokens: of a prompt.
        most_new_tokens: of a choice.
        most_choices: choices of all prompts of a request together.
    """

    most_prompt_tokens: int
    most_new_tokens: int = 2048
    most_choices: int = 16


class CompletionRequest(NamedTuple):
    """What a client asks for.

    Attributes:
        prompts: token ids of each prompt, at least one.
        max_tokens: largest number of new tokens of a choice.
        choices: how many continuations each prompt gets.
        sampling: settings of the draws; choice number i has seed + i.
        stops: strings that end a choice.
        streams: whether pieces are wanted as they come.
        with_usage: whether the stream ends with the count of tokens.
        logprobs: how many of the likeliest tokens are named beside each token's logprob; None for no logprobs.
        echo: whether the answer begins with the prompt.
    """

    prompts: list[list[int]]
    max_tokens: int
    choices: int
    sampling: Sampling
    stops: tuple[str, ...]
    streams: bool
    with_usage: bool
    logprobs: int | None
    echo: bool


def read_request(
    body: dict[str, Any], model: str, tokenizer: Tokenizer, end: int | None, limits: CompletionLimits
) -> CompletionRequest:
    """Read the fields of a request.

    Args:
        body: JSON object that the client has sent.
        model: name under which the model is served.
        tokenizer: of the model.
        end: id that an empty prompt stands for; None where there is none.
        limits: of the server.

    Raises:
        UserError: a field is unknown, not served, of another type or out of its limits; ``where`` names it.
    """
    _check_fields(body, model)
    choices = _whole("n", body, 1, 1, limits.most_choices)
    prompts = _read_prompts(body.get("prompt"), tokenizer, end, limits)
    if len(prompts) * choices > limits.most_choices:
        problem = f"asks for {choices} choices of each of {len(prompts)} prompts, and the server gives"
        raise UserError("n", f"{problem} {limits.most_choices} at a time", "send fewer prompts or choices at a time")
    streams, echo = _truth("stream", body), _truth("echo", body)
    logprobs = body.get("logprobs")
    if logprobs is not None:
        logprobs = _whole("logprobs", body, 0, 0, MOST_LOGPROBS)
    temperature = read_number("temperature", body.get("temperature"), Setting(1.0, False, 0, math.inf))
    top_k = read_number("top_k", body.get("top_k"), Setting(None, True, 1, math.inf))
    top_p = read_number("top_p", body.get("top_p"), Setting(1.0, False, math.ulp(0), 1))
    seed = read_number("seed", body.get("seed"), Setting(None, True, 0, 2**62))
    if seed is None:
        seed = random.SystemRandom().randrange(2**62)
    assert temperature is not None, "temperature has a default"
    return CompletionRequest(
        prompts=prompts,
        max_tokens=_whole("max_tokens", body, min(16, limits.most_new_tokens), 0, limits.most_new_tokens),
        choices=choices,
        sampling=Sampling(temperature, None if top_k is None else int(top_k), top_p if top_p != 1 else None, int(seed)),
        stops=_read_stops(body.get("stop")),
        streams=streams,
        with_usage=_wants_usage(body.get("stream_options"), streams),
        logprobs=logprobs,
        echo=echo,
    )


def _check_fields(body: dict[str, Any], model: str) -> None:
    """Check that all fields are served, and that the model is ours."""
    for name in body:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(FIELDS)}"
            raise UserError(f"{name:.50}", "is no field of a completion", remedy)
    for name, neutral in NEUTRAL.items():
        if body.get(name) not in neutral:
            raise UserError(name, f"{body[name]!r:.50} is not served", "leave it out")
    if not isinstance(body.get("model"), str):
        raise UserError("model", "is missing, or is no text", f'send "model": "{model}"')


def _read_prompts(prompt: Any, tokenizer: Tokenizer, end: int | None, limits: CompletionLimits) -> list[list[int]]:
    """Return the ids of a prompt or of several: texts, or lists of ids."""
    if prompt is None:
        prompt = ""
    several = isinstance(prompt, list) and not all(type(token) is int for token in prompt)
    parts = prompt if several else [prompt]
    if prompt == []:
        raise UserError("prompt", "is an empty list", "send a text or token ids")
    if len(parts) > limits.most_choices:
        raise UserError("prompt", f"has {len(parts)} prompts, and the server takes {limits.most_choices}", "send fewer")
    return [_read_prompt(part, tokenizer, end, limits.most_prompt_tokens) for part in parts]


def _read_prompt(prompt: Any, tokenizer: Tokenizer, end: int | None, most: int) -> list[int]:
    """Return the ids of one prompt, at least one and at most ``most``."""
    if isinstance(prompt, str):
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise UserError("prompt", "has half a surrogate pair, which is no character", "send whole characters")
        ids = [int(token) for token in tokenizer.encode(prompt)]
        ids = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]  # as documents of the data begin
    elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
        ids = prompt
        unknown = next(iter(set(ids) - set(tokenizer.known_ids())), None)
        if unknown is not None:
            raise UserError("prompt", f"has the id {unknown}, which the tokenizer does not have", "send its own ids")
    else:
        raise UserError("prompt", "is no text, no list of token ids and no list of these", "send a text")
    if not ids and end is None:
        raise UserError("prompt", "is empty, and the tokenizer has no end-of-document token", "send some text")
    if len(ids) > most:
        raise UserError("prompt", f"has {len(ids):,} tokens, and the model reads {most:,} at most", "shorten it")
    return ids if ids else [end]  # type: ignore[list-item]  # it was checked above


def _read_stops(stop: Any) -> tuple[str, ...]:
    stops: Sequence[Any] = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if len(stops) > MOST_STOPS:
        raise UserError("stop", f"has {len(stops)} strings, and {MOST_STOPS} are allowed", "send fewer")
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_STOP:
            raise UserError("stop", f"{text!r:.50} is no text of 1 to {LONGEST_STOP} characters", "send one")
    return tuple(stops)


def _wants_usage(options: Any, streams: bool) -> bool:
    """Return whether a stream ends with the count of tokens."""
    if options is None:
        return False
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"} or not streams:
        raise UserError("stream_options", "is for streams, and has include_usage alone", "leave it out")
    return _truth("include_usage", options)


def _truth(name: str, body: dict[str, Any]) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(name, f"{value!r:.50} is neither true nor false", "send one of them")
    return bool(value)


def _whole(name: str, body: dict[str, Any], default: int, least: int, most: int) -> int:
    number = read_number(name, body.get(name), Setting(default, True, least, most))
    assert number is not None, "there is a default"
    return int(number)
