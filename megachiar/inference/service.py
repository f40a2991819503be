"""Share one engine among many clients: a thread of its own steps it, and clients wait for their tokens.

client threads          submit -> inbox        cancel -> inbox        <- queue of each submission
the engine's thread     inbox -> engine.add, engine.cancel; engine.step; tokens -> queues
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from megachiar.inference.engine import Engine, Generation, Request
from megachiar.inference.sampling import TokenScore


class Busy(Exception):
    """There are as many texts as the service takes."""


class Stopped(Exception):
    """The service takes no texts any more, or gave up those that it had."""


class TextEvent(NamedTuple):
    """What has happened to one text of a submission.

    Attributes:
        number: of the text in the submission.
        score: the new token; None for none.
        finish: why the text is complete, ``stop`` or ``length``; None while it goes on.
        prompt_scores: scores of the prompt's tokens, if the request wants them.
    """

    number: int
    score: TokenScore | None = None
    finish: str | None = None
    prompt_scores: Sequence[TokenScore] = ()


class Submission:
    """The texts of one client.

    Args:
        requests: one for each text.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self.generations: list[Generation | None] = [None] * len(requests)
        self.events: queue.SimpleQueue[TextEvent | None] = queue.SimpleQueue()
        self.left = set(range(len(requests)))

    def next_event(self, seconds: float) -> TextEvent | None:
        """Return the next event; None if there is none within so many seconds.

        Raises:
            Stopped: the service gave the texts up.
        """
        try:
            event = self.events.get(timeout=seconds)
        except queue.Empty:
            return None
        if event is None:
            raise Stopped
        return event


class Service:
    """An engine that many threads use.

    Args:
        engine: that nobody else uses.
        most_texts: the most texts that wait or run at a time.
    """

    def __init__(self, engine: Engine, most_texts: int):
        self._engine, self._most_texts = engine, most_texts
        self._changed = threading.Condition()
        self._arrived: list[Submission] = []
        self._cancelled: list[tuple[Submission, int]] = []
        self._texts = 0
        self._cache_bytes = 0
        self._is_stopping = False
        self._owners: dict[Generation, tuple[Submission, int]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def texts(self) -> int:
        """How many texts wait or run."""
        return self._texts

    @property
    def cache_bytes(self) -> int:
        """The bytes of all caches, as the last step left them."""
        return self._cache_bytes

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Let texts be continued.

        Raises:
            Busy: they are too many with those that are there.
            Stopped: the service has ended.
        """
        submission = Submission(requests)
        with self._changed:
            if self._is_stopping:
                raise Stopped
            if self._texts + len(requests) > self._most_texts:
                raise Busy
            self._texts += len(requests)
            self._arrived.append(submission)
            self._changed.notify()
        return submission

    def cancel(self, submission: Submission, index: int | None = None) -> None:
        """Give up one text of a submission, or all that are left. What is complete stays so."""
        with self._changed:
            self._cancelled += [(submission, each) for each in ([index] if index is not None else submission.left)]
            self._changed.notify()

    def stop(self) -> None:
        """End the service after its step; clients that wait get ``Stopped``."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._take_in():
            try:
                drawn = self._engine.step()
            except Exception:  # a defect, or no memory: the texts of this moment are lost, and the service goes on
                traceback.print_exc()
                self._give_up()
                continue
            self._cache_bytes = self._engine.cache_bytes
            for generation, score in drawn:
                submission, index = self._owners[generation]
                submission.events.put(TextEvent(index, score, None, generation.prompt_scores))
            for generation in [generation for generation in self._owners if generation.finish is not None]:
                self._finish(generation)
        self._give_up()

    def _take_in(self) -> bool:
        """Wait for something to do, take in what has come, and return whether the service goes on."""
        with self._changed:
            while not (self._arrived or self._cancelled or self._is_stopping) and self._engine.is_idle:
                self._changed.wait()
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
        for submission in arrived:
            for index, request in enumerate(submission.requests):
                generation = self._engine.add(request)
                submission.generations[index] = generation
                self._owners[generation] = submission, index
        for submission, index in cancelled:
            known = submission.generations[index]
            if known is not None and known in self._owners:
                self._engine.cancel(known)
                self._forget(known)
        return not self._is_stopping

    def _finish(self, generation: Generation) -> None:
        submission, index = self._owners[generation]
        submission.events.put(TextEvent(index, None, generation.finish, generation.prompt_scores))
        self._forget(generation)

    def _forget(self, generation: Generation) -> None:
        submission, index = self._owners.pop(generation)
        with self._changed:
            submission.left.discard(index)
            self._texts -= 1

    def _give_up(self) -> None:
        """Forget all texts, and tell the clients that wait for them."""
        for generation, (submission, _) in list(self._owners.items()):
            self._engine.cancel(generation)
            self._forget(generation)
            submission.events.put(None)
        with self._changed:
            for submission in self._arrived if self._is_stopping else ():
                submission.events.put(None)
