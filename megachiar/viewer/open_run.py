"""Open a run to look at its routes: those of a text, and those of a text that the run continues."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megachiar.analysis.route_trace import RouteTrace, record_routes
from megachiar.analysis.text_routes import (
    TextRoutes,
    Window,
    describe_text,
    describe_tokens,
    joined,
    on_cpu,
    text_routes,
)
from megachiar.analysis.token_texts import token_classes
from megachiar.checkpoint.format import CheckpointState
from megachiar.checkpoint.reading import Log, locate_step
from megachiar.config import RunConfig
from megachiar.data.tokenizers.token_reader import TokenReader, TokenText
from megachiar.errors import UserError
from megachiar.inference.loaded_run import TextSampler, default_device
from megachiar.inference.loading import load_model
from megachiar.model import ChiarFormer


@dataclass(frozen=True)
class OpenRun:
    """A run whose model is in memory. Several threads may use it: one forward pass runs at a time.

    Attributes:
        path: as the user named it.
        config: of the run.
        model: in evaluation mode.
        state: the checkpoint's record.
        sampler: continues texts, and has the tokenizer.
    """

    path: Path
    config: RunConfig
    model: ChiarFormer
    state: CheckpointState
    sampler: TextSampler
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def header(self) -> dict[str, Any]:
        """Return what a page says of the run."""
        model = self.config.model
        return {
            "run": str(self.path),
            "step": self.state.step,
            "kind": model.kind,
            "parameters": self.model.parameter_count(),
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "validation": self.state.validation,
        }

    def record(self, routes: TextRoutes) -> dict[str, Any]:
        """Return the record of a text: the header and what ``TextRoutes.as_dict`` returns."""
        return {**self.header(), **routes.as_dict(self.config.model)}

    def encode(self, text: str, where: str) -> list[int]:
        """Return the tokens of ``text``.

        Args:
            text: what is encoded.
            where: what a message names, such as ``--text``.

        Raises:
            UserError: the text is no Unicode, or has no tokens.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(where, "has bytes that are no UTF-8", "give text in UTF-8")
        ids = [int(token) for token in self.sampler.tokenizer.encode(text)]
        if not ids:
            raise UserError(where, "has no tokens", "give some text")
        return ids

    def routes(self, tokens: Sequence[int], prompt_tokens: int | None = None) -> TextRoutes:
        """Return the routes of the tokens of a text, at least one; see ``text_routes``."""
        with self._one_at_a_time:
            return text_routes(self.model, self.sampler.tokenizer, tokens, prompt_tokens)

    def continue_text(self, prompt: Sequence[int], max_new_tokens: int, **sampling: Any) -> Iterator[dict[str, Any]]:
        """Continue a text and yield what a page shows meanwhile.

        Args:
            prompt: ids of the text; empty for a new document.
            max_new_tokens: largest number of new tokens.
            sampling: keyword arguments of ``generate``: temperature, top_k, top_p and seed.

        Yields:
            ``{"record": ...}`` of the prompt, ``{"token": ...}`` for each new token, with the routes that it took when
            the model read it, and ``{"record": ...}`` of all of it.

        Raises:
            UserError: the prompt is empty and no token ends a document.
        """
        start = list(self.sampler.start(prompt))
        before = self.routes(start)
        yield {"record": self.record(before)}
        reader = TokenReader(self.sampler.tokenizer)
        for token in start:
            reader.read(token)
        tokens, windows, traces = list(start), list(before.windows), [before.trace]
        # One more than is shown, since a token is read, and takes its routes, when the next one is drawn.
        drawn = self.sampler.stream(start, max_new_tokens + 1, **sampling)
        while (step := self._next(drawn)) is not None:
            following, passed = step
            if len(tokens) > len(start):
                traces.append(passed.tokens(slice(-1, None)))
                windows = _extended(windows, passed.operator.shape[-1], len(tokens))
                yield {"token": _described(tokens[-1], reader.read(tokens[-1]), traces[-1])}
            if following is None or len(tokens) == len(start) + max_new_tokens:
                break
            tokens.append(following)
        if len(tokens) > len(start):
            losses, tokenizer = self.routes(tokens).losses, self.sampler.tokenizer
            whole = describe_text(tokenizer, tokens, windows, joined(traces), losses, len(start))
            yield {"record": self.record(whole)}

    def _next(self, drawn: Iterator[int]) -> tuple[int | None, RouteTrace] | None:
        """Return the next token, None at the end of the text, and the routes of the pass that it was drawn from.

        Returns None if there was no pass any more.
        """
        with self._one_at_a_time, record_routes(self.model) as passes:
            token = next(drawn, None)
        return (token, on_cpu(passes[-1])) if passes else None


def open_run(path: Path, step: int | None = None, dtype: torch.dtype | None = None, *, log: Log) -> OpenRun:
    """Open the run at ``path``.

    Args:
        path: run folder, or one checkpoint.
        step: of the checkpoint; None for the newest whole one.
        dtype: of the weights; None takes that of the run.
        log: is told of each checkpoint that is passed over.

    Raises:
        UserError: there is no such checkpoint, or no tokenizer of the run.
    """
    checkpoint = locate_step(path, step, log=log)
    config, model, state = load_model(checkpoint, default_device(), dtype)
    return OpenRun(path, config, model, state, TextSampler(checkpoint, config, model))


def _extended(windows: Sequence[Window], read: int, tokens: int) -> list[Window]:
    """Return ``windows`` after a pass that read the last ``read`` of ``tokens`` tokens, one of them new.

    A pass of several tokens begins a new window: the model has read the end of the text again.
    """
    if read > 1:
        return [*windows, Window(tokens - read, tokens - 1, tokens)]
    return [*windows[:-1], windows[-1]._replace(stop=tokens)]


def _described(token: int, text: TokenText, trace: RouteTrace) -> dict[str, Any]:
    """Return the record of a token whose neighbours on its right are not known yet."""
    classes = token_classes([text])
    routes = TextRoutes((token,), (text,), tuple(classes), (Window(0, 0, 1),), trace, np.full(1, np.nan), 0)
    return next(describe_tokens(routes))
