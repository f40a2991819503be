"""Exchange small messages with the other ranks through the run's rendezvous store, from a thread of its own.

A call to the store has no end while the process that holds the store is stopped, and rank 0 may hold it. So one thread
makes all calls. Whoever wants to know how it stands looks at what it has read last, and whether it still reads.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist


class StoreExchange:
    """Sends this rank's message and reads those of others every few seconds.

    Args:
        keys: that are read, all of which must be set by some rank before ``start_reading``.
        own_key: that this rank's message is set under.
        message: returns this rank's message.
        interval_s: seconds between two exchanges.

    Attributes:
        values: what was read last, by key.
        rounds: how many exchanges have succeeded.
        error: what ended the exchange, such as a closed connection; None as long as it goes on.
    """

    def __init__(self, keys: Sequence[str], own_key: str, message: Callable[[], str], interval_s: float):
        self.values: dict[str, str] = {}
        self.rounds = 0
        self.error: str | None = None
        self._keys = list(keys)
        self._own_key = own_key
        self._message = message
        self._interval = interval_s
        self._reads = False
        self._outbox: dict[str, str] = {}
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="store exchange", daemon=True)

    def start(self) -> None:
        """Connect and begin to send."""
        self._thread.start()

    def start_reading(self) -> None:
        """Begin to read, now that all keys are set."""
        self._reads = True

    def put(self, key: str, value: str) -> None:
        """Set a key with the next exchange, which begins at once."""
        self._outbox[key] = value
        self._wake.set()

    def flush(self, within_s: float) -> bool:
        """Wait until an exchange that begins now has succeeded, but no longer than so many seconds; return whether."""
        wanted, until = self.rounds + 2, time.monotonic() + within_s  # one may be under way already
        while self.rounds < wanted and self.error is None and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.02)
        return self.rounds >= wanted

    def end(self, within_s: float) -> None:
        """End the exchange, waiting for the call that is under way at most so many seconds."""
        self._ended = True
        self._wake.set()
        self._thread.join(within_s)

    def _run(self) -> None:
        try:
            store = self._connect()
            while not self._ended:
                self._wake.clear()
                self._exchange(store)
                self.rounds += 1
                self._wake.wait(self._interval)
        except (RuntimeError, dist.DistError) as error:
            self.error = str(error).splitlines()[0][:200] if str(error) else type(error).__name__

    def _exchange(self, store: dist.Store) -> None:
        store.set(self._own_key, self._message())
        while self._outbox:
            key = next(iter(self._outbox))
            store.set(key, self._outbox[key])
            del self._outbox[key]
        if self._reads:
            values = [value.decode(errors="replace") for value in store.multi_get(self._keys)]
            self.values = dict(zip(self._keys, values, strict=True))

    def _connect(self) -> dist.Store:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=max(10.0, self._interval * 2)),
            wait_for_workers=False,
        )
        return dist.PrefixStore(f"megachiar/watch/{attempt}", store)
