"""Turn the tokens of a growing text into text, piece by piece, and end it at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from megachiar.data.tokenizers.token_reader import LONGEST_CHARACTER, TokenReader
from megachiar.data.tokenizers.tokenizer import Tokenizer


class TextStream:
    """The text of new tokens. The pieces joined are the text of all of them, up to the first stop string.

    The end of the text that may be the beginning of a stop string is held back until more is known.

    Attributes:
        texts: what each new token stands for, as far as it is known; a token at which a character is not complete
            stands for nothing, and the one that completes it for all of it.
        stopped: whether a stop string was met. No token is to be read then.

    Args:
        tokenizer: of the tokens.
        prompt: the tokens before the new ones.
        stops: strings that end the text and are left out, none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        self._reader, self._stops = TokenReader(tokenizer), tuple(stops)
        # The last tokens alone decide how the next one is decoded.
        for token in prompt[-2 * LONGEST_CHARACTER :]:
            self._reader.read(token)
        self._text = ""
        self._shown = 0
        self.texts: list[str] = []
        self.stopped = False

    @property
    def shown(self) -> int:
        """How many characters were returned so far."""
        return self._shown

    def read(self, token: int) -> str:
        """Return the text that the next token adds to what can be shown."""
        return self._add(self._reader.read(token).text)

    def finish(self) -> str:
        """Return what was held back, at the end of the tokens."""
        if self.stopped:
            return ""
        rest = self._reader.rest()
        if rest and self.texts:
            self.texts[-1] += rest
        self._look_for_stops(len(self._text))
        self._text = self._text if self.stopped else self._text + rest
        return self._show(len(self._text))

    def _add(self, text: str) -> str:
        before = len(self._text)
        self._text += text
        self.texts.append(text)
        self._look_for_stops(before)
        return self._show(len(self._text) if self.stopped else len(self._text) - self._held())

    def _look_for_stops(self, before: int) -> None:
        """Cut the text at the first stop string, which ends behind its first ``before`` characters."""
        places = []
        for stop in self._stops:
            place = self._text.find(stop, max(0, before - len(stop) + 1))
            if place >= 0:
                places.append(place)
        if places:
            self._text, self.stopped = self._text[: min(places)], True

    def _held(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._text)), 0, -1):
            end = self._text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def _show(self, end: int) -> str:
        """Return the text up to character ``end`` that was not returned yet."""
        piece = self._text[self._shown : end]
        self._shown += len(piece)
        return piece
