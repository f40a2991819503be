"""Read what a page asks of the demo, and say in one message what is wrong with it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from megachiar.errors import UserError
from megachiar.request_fields import Setting, read_number
from megachiar.viewer.open_run import OpenRun


class DemoLimits(NamedTuple):
    """How much one request may ask for.

    Attributes:
        most_tokens: of a text.
        most_new_tokens: of its continuation.
    """

    most_tokens: int = 5000
    most_new_tokens: int = 2000


def read_text(run: OpenRun, body: dict[str, Any], limits: DemoLimits, *, may_be_empty: bool = False) -> list[int]:
    """Return the tokens of the text of a request.

    Raises:
        UserError: there is no text, or it has too many tokens.
    """
    text = body.get("text")
    if not isinstance(text, str):
        raise UserError("text", "is missing, or is no text", 'send {"text": "..."}')
    if not text and may_be_empty:
        return []
    tokens = run.encode(text, "text")
    if len(tokens) > limits.most_tokens:
        problem = f"has {len(tokens):,} tokens, and the demo reads {limits.most_tokens:,} at most"
        raise UserError("text", problem, "shorten it, or start the demo with a larger --max-tokens")
    return tokens


def read_tokens(run: OpenRun, body: dict[str, Any], limits: DemoLimits) -> tuple[list[int], int]:
    """Return the tokens of a request that a page has had from the demo, and how many of them were given.

    Raises:
        UserError: they are no ids of the run's tokenizer, or too many.
    """
    tokens, prompt_tokens = body.get("tokens"), body.get("prompt_tokens")
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise UserError("tokens", "is no list of ids", "send those of a record")
    if not set(tokens) <= set(run.sampler.tokenizer.known_ids()):
        raise UserError("tokens", "has ids that the run's tokenizer does not have", "send those of a record")
    if type(prompt_tokens) is not int or not 0 <= prompt_tokens <= len(tokens):
        raise UserError("prompt_tokens", f"is not 0 to {len(tokens)}", "send that of a record")
    if len(tokens) > limits.most_tokens + limits.most_new_tokens:
        problem = f"has {len(tokens):,} ids, and the demo reads {limits.most_tokens + limits.most_new_tokens:,} at most"
        raise UserError("tokens", problem, "shorten it")
    return tokens, prompt_tokens


def read_sampling(body: dict[str, Any], limits: DemoLimits) -> dict[str, Any]:
    """Return the settings of ``OpenRun.continue_text`` that a request holds; the others have their defaults.

    Raises:
        UserError: one of them is no number, or not within its limits.
    """
    settings = {
        "max_new_tokens": Setting(60, True, 1, limits.most_new_tokens),
        "temperature": Setting(0.8, False, 0, math.inf),
        "top_k": Setting(None, True, 1, math.inf),
        "top_p": Setting(None, False, math.ulp(0), 1),
        "seed": Setting(0, True, 0, 2**62),
    }
    return {name: read_number(name, body.get(name), setting) for name, setting in settings.items()}
