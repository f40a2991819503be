"""One choice of a completion: the text and the logprobs of a text that grows, in the form of OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from megachiar.data.tokenizers.token_reader import token_texts
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.inference.completion_request import CompletionRequest
from megachiar.inference.sampling import TokenScore
from megachiar.inference.service import TextEvent
from megachiar.inference.text_stream import TextStream


class _Entry(NamedTuple):
    """A token of the answer: its text, the first character of it there, and the token before it, if there is one."""

    score: TokenScore
    text: str
    offset: int
    before: int | None


class Choice:
    """A choice while its text is generated.

    Attributes:
        index: its number in the answer.
        finish: why it is complete: ``stop`` or ``length``; None while it goes on.
        new_tokens: how many tokens were generated for it.

    Args:
        index: as the attribute.
        prompt: token ids.
        request: of the client.
        tokenizer: of the model.
    """

    def __init__(self, index: int, prompt: Sequence[int], request: CompletionRequest, tokenizer: Tokenizer):
        self.index, self._prompt, self._request, self._tokenizer = index, prompt, request, tokenizer
        self._stream = TextStream(tokenizer, prompt, request.stops)
        self._prompt_texts = [text.text for text in token_texts(tokenizer, prompt)]
        self._begins = True
        self._scores: list[TokenScore] = []
        self._sent = 0
        self.new_tokens = 0
        self.finish: str | None = None

    def read(self, event: TextEvent) -> dict[str, Any]:
        """Return what an event adds to the choice, in the protocol's form; its text may be empty."""
        piece, entries = "", []
        if self._begins and self._request.echo:
            piece = "".join(self._prompt_texts)
            entries = self._entries_of_prompt(event.prompt_scores)
        self._begins = False
        if event.score is not None:
            self._scores.append(event.score)
            self.new_tokens += 1
            piece += self._stream.read(event.score.token)
        if event.finish is not None:
            piece += self._stream.finish()
        self.finish = "stop" if self._stream.stopped else event.finish
        entries += self._new_entries()
        return {
            "index": self.index,
            "text": piece,
            "logprobs": self._as_logprobs(entries) if self._request.logprobs is not None else None,
            "finish_reason": self.finish,
        }

    def _entries_of_prompt(self, scores: Sequence[TokenScore]) -> list[_Entry]:
        offsets = _offsets(self._prompt_texts, 0)
        before = [None, *self._prompt[:-1]]
        return [_Entry(*parts) for parts in zip(scores, self._prompt_texts, offsets, before, strict=False)]

    def _new_entries(self) -> list[_Entry]:
        """Return the new tokens whose text has been shown since the last call."""
        echoed = len("".join(self._prompt_texts)) if self._request.echo else 0
        texts, shown = self._stream.texts, self._stream.shown
        offsets = _offsets(texts, 0)
        entries = []
        for number in range(self._sent, len(self._scores)):
            is_shown = offsets[number] + len(texts[number]) <= shown
            is_cut = self._stream.stopped and offsets[number] < shown
            if not (is_shown or is_cut) or (self._stream.stopped and offsets[number] >= shown):
                break
            before = self._scores[number - 1].token if number else self._prompt[-1]
            entries.append(_Entry(self._scores[number], texts[number], offsets[number] + echoed, before))
        self._sent += len(entries)
        return entries

    def _as_logprobs(self, entries: Sequence[_Entry]) -> dict[str, Any]:
        names = [self._name(entry.score.token, entry.text, entry.before) for entry in entries]
        return {
            "tokens": names,
            "token_logprobs": [entry.score.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries] if self._request.logprobs else None,
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, entry: _Entry) -> dict[str, float] | None:
        """Return the likeliest tokens by their texts; of several with one text the likeliest."""
        if entry.score.logprob is None:
            return None
        named: dict[str, float] = {}
        for token, logprob in entry.score.top:
            named.setdefault(self._name(token, "", entry.before), logprob)
        return named

    def _name(self, token: int, text: str, before: int | None) -> str:
        """Return the text of a token behind another one, or the name of a control token."""
        if token in self._tokenizer.controls:
            return self._tokenizer.controls[token]
        earlier = [] if before is None or before in self._tokenizer.controls else [before]
        return text or self._tokenizer.decode([*earlier, token])[len(self._tokenizer.decode(earlier)) :]


def _offsets(texts: Sequence[str], start: int) -> list[int]:
    """Return the first character of each text where they follow one another from character ``start``."""
    offsets = []
    for text in texts:
        offsets.append(start)
        start += len(text)
    return offsets
