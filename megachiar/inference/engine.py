"""The engine of generation: it continues many texts at a time, each as if it were alone.

    add     a request waits                           prompt
    step    waiting requests take free places         prompt -> cache, first new token      (prefill)
            all running texts get one more token      newest token -> cache, next one       (decode, in one pass)
            texts that are complete give up their place
    cancel  a text leaves between two steps

Texts of one pass have lengths, caches, seeds and settings of their own, and what joins or leaves changes nothing for
the others. Texts with equally many unread tokens share a pass: in most steps that is one token each.

Shapes: B = texts of a pass, T = unread tokens of each, V = vocabulary size of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megachiar.inference.sampling import Sampling, TokenScore, sample, score
from megachiar.model.kv_cache import DecodingCache, SequenceCache
from megachiar.model.transformer import ChiarFormer

PREFILL_ROWS = 2048
"""The most tokens that a pass reads, unless one text alone has more."""


@dataclass(frozen=True)
class Request:
    """A text that is to be continued.

    Attributes:
        prompt: at least one token id. Only the last ``max_sequence_length`` ids of a longer prompt are read.
        max_new_tokens: largest number of new tokens.
        sampling: settings of the draws.
        end: id that ends the text and is left out; None where nothing but the number of tokens ends it.
        sample_id: number of the text, which keys random routes.
        top_logprobs: score new tokens, and name so many of the likeliest ones each time; None for no scores.
        scores_prompt: whether the tokens of the prompt are scored too.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009  # a tuple, which nobody can change
    end: int | None = None
    sample_id: int = 0
    top_logprobs: int | None = None
    scores_prompt: bool = False


@dataclass(eq=False)
class Generation:
    """A text while it is continued.

    Attributes:
        request: that asked for it.
        tokens: prompt and new ids so far.
        finish: why it is complete: ``stop`` (the end of the text) or ``length``; None while it goes on.
        prompt_scores: scores of the prompt's tokens, if the request wants them, once the prompt was read.
        cache: of the tokens that were read; empty again where the text is read anew.
        unread: ids that the next pass reads.
    """

    request: Request
    tokens: list[int]
    generator: torch.Generator
    finish: str | None = None
    prompt_scores: list[TokenScore] = field(default_factory=list)
    cache: SequenceCache = field(default_factory=SequenceCache)
    unread: list[int] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        """How many tokens are new."""
        return len(self.tokens) - len(self.request.prompt)


class Drawn(NamedTuple):
    """A new token of a text.

    Attributes:
        generation: the text.
        score: the token, with its score if the request wants scores.
    """

    generation: Generation
    score: TokenScore


class Engine:
    """Continue texts with a model. One thread uses an engine at a time.

    Args:
        model: in evaluation mode.
        known_ids: ids that the tokenizer has, bool (V,). A model may have more ids, which pad its vocabulary and are
            never sampled. None means that the tokenizer has all of them.
        most_running: the most texts that have a cache at a time; others wait.
    """

    def __init__(self, model: ChiarFormer, known_ids: torch.Tensor | None = None, most_running: int = 8):
        self._model, self._most_running = model, most_running
        self._known = None if known_ids is None or bool(known_ids.all()) else known_ids
        self._device = next(model.parameters()).device
        self._longest = model.config.max_sequence_length
        self._is_cached = why_uncached(model) is None
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []

    @property
    def is_idle(self) -> bool:
        """Whether no text waits or runs."""
        return not self._waiting and not self._running

    @property
    def running(self) -> int:
        """How many texts have a place."""
        return len(self._running)

    @property
    def cache_bytes(self) -> int:
        """The bytes of all caches."""
        return sum(generation.cache.num_bytes for generation in self._running)

    def add(self, request: Request) -> Generation:
        """Let a text wait for a place. It is complete at once if nothing is wanted of it."""
        generator = torch.Generator().manual_seed(request.sampling.seed)
        generation = Generation(request, list(request.prompt), generator)
        generation.unread = last_document(generation.tokens[-self._longest :], self._model.document_end)
        if request.max_new_tokens > 0 or request.scores_prompt:
            self._waiting.append(generation)
        else:
            generation.finish = "length"
        return generation

    def cancel(self, generation: Generation) -> None:
        """Forget a text, and free its cache. A text that is complete, or was forgotten before, is no error."""
        if generation in self._waiting:
            self._waiting.remove(generation)
        self._running = [other for other in self._running if other is not generation]

    @torch.inference_mode()
    def step(self) -> list[Drawn]:
        """Give places to texts that wait, and draw one token for each text that has a place.

        Returns:
            The new tokens. A text without one has met its end, or wanted none.
        """
        while self._waiting and len(self._running) < self._most_running:
            generation = self._waiting.popleft()
            if generation.request.scores_prompt:
                generation.prompt_scores = self._scores_of_prompt(generation.request)
            if generation.request.max_new_tokens == 0:
                generation.finish = "length"
            else:
                self._running.append(generation)
        drawn: list[Drawn] = []
        for group in self._groups():
            for generation, logits in zip(group, self._read(group), strict=True):
                drawn += self._draw(generation, logits)
        self._running = [generation for generation in self._running if generation.finish is None]
        return drawn

    def _groups(self) -> list[list[Generation]]:
        """Return the running texts in groups that share a pass."""
        by_length: dict[int, list[Generation]] = {}
        for generation in self._running:
            self._prepare(generation)
            by_length.setdefault(len(generation.unread), []).append(generation)
        groups = []
        for length, generations in by_length.items():
            size = max(1, PREFILL_ROWS // length) if self._is_cached else 1
            groups += [generations[start : start + size] for start in range(0, len(generations), size)]
        return groups

    def _prepare(self, generation: Generation) -> None:
        """Choose what the next pass reads where that is not just the newest token."""
        end = self._model.document_end
        if not self._is_cached:
            generation.unread = last_document(generation.tokens[-self._longest :], end)
        elif generation.cache.length + len(generation.unread) > self._longest:
            generation.cache = SequenceCache()
            generation.unread = last_document(generation.tokens[-max(1, self._longest // 2) :], end)

    def _read(self, group: list[Generation]) -> torch.Tensor:
        """Read the unread tokens of texts, and return the logits (B, V) behind them, fp32 on the CPU."""
        tokens = torch.tensor([generation.unread for generation in group], device=self._device)
        numbers = torch.tensor([generation.request.sample_id for generation in group], device=self._device)
        cache = DecodingCache(generation.cache for generation in group) if self._is_cached else None
        output = self._model(tokens, sample_ids=numbers, cache=cache, last_logits=True)
        return output.logits[:, -1].float().cpu()

    def _draw(self, generation: Generation, logits: torch.Tensor) -> list[Drawn]:
        """Draw the next token of a text from logits (V,); nothing is returned at its end."""
        request = generation.request
        temperature, top_k, top_p, _ = request.sampling
        token = sample(logits, temperature, top_k, top_p, generation.generator, self._known)
        if token == request.end:
            generation.finish = "stop"
            return []
        scored = TokenScore(token)
        if request.top_logprobs is not None:
            scored = score(logits, token, request.top_logprobs, self._known)
        if self._model.document_end is not None and generation.tokens[-1] == self._model.document_end:
            generation.cache = SequenceCache()  # the new token begins a document
        generation.tokens.append(token)
        generation.unread = [token]
        if generation.new_tokens == request.max_new_tokens:
            generation.finish = "length"
        return [Drawn(generation, scored)]

    def _scores_of_prompt(self, request: Request) -> list[TokenScore]:
        """Score each token of a prompt, of which the last ``max_sequence_length`` are read in one pass."""
        skipped = max(0, len(request.prompt) - self._longest)
        scores = [TokenScore(token) for token in request.prompt[: skipped + 1]]
        tokens = torch.tensor([list(request.prompt[skipped:])], device=self._device)
        number = torch.tensor([request.sample_id], device=self._device)
        logits = self._model(tokens, sample_ids=number).logits[0]
        for token, before in zip(tokens[0, 1:].tolist(), logits, strict=False):
            scores.append(score(before.float().cpu(), token, request.top_logprobs or 0, self._known))
        return scores


def why_uncached(model: ChiarFormer) -> str | None:
    """Return why hidden states of earlier positions change when a token is added; None where they do not."""
    config = model.config
    if config.kind == "baseline" or config.meta_router.pool != "batch":
        return None
    return (
        "model.meta_router.pool is batch: the gate of layer 1 changes for all positions with each token. "
        "The last max_sequence_length tokens are read anew for each one, without a cache"
    )


def last_document(text: Sequence[int], end: int | None) -> list[int]:
    """Return the ids of ``text`` that its last token attends to: all, or those of its document if ``end`` ends one."""
    start = len(text) - 1
    while start > 0 and text[start - 1] != end:
        start -= 1
    return list(text[start:]) if end is not None else list(text)
