"""When a rank is gone the others say which one, and stop.

A collective waits for every rank. Where one was killed, gloo fails with a message that names nobody, and NCCL waits. So
each rank has a thread that tells the run's rendezvous store (at MASTER_ADDR:MASTER_PORT) every few seconds that its
process lives, and looks at what the others say. A process that is stopped or swapped out is silent, too; one that hangs
in a collective goes on to speak, and is ended by the collective's own timeout.

It costs two small messages a beat on a thread that sleeps in between.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from megachiar.errors import UserError
from megachiar.topology import Topology

EXIT_PEER_LOST = 1
_FAILED_COLLECTIVE = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Broken pipe|[Tt]imed out|TCPStore|recvValue", re.DOTALL
)
_REMEDY = "look at that rank's own output; started again, the run goes on from its last checkpoint"
_GRACE_S = 3.0
"""For this process to meet the same end as a peer that told the reason of its own."""


@dataclass
class _Peer:
    """What is known of another rank: the last it said, and when that was news (by this process's clock)."""

    said: str = ""
    heard: float = 0.0

    @property
    def place(self) -> str:
        host, pid = (self.said.split("\t") + ["?", "?"])[:2]
        return f"{host}, process {pid}"

    @property
    def farewell(self) -> str | None:
        """Why it ended, if it said so."""
        parts = self.said.split("\t", 3)
        return parts[3] if len(parts) > 3 else None


class PeerWatch:
    """Context in which the ranks of a run watch one another.

    Args:
        topology: of the run; with one rank nothing is done.
        timeout_s: silence after which a rank is given up, in seconds.
    """

    def __init__(self, topology: Topology, timeout_s: float):
        self._rank, self._ranks, self._timeout = topology.rank, topology.world_size, timeout_s
        self._interval = min(2.0, timeout_s / 5)
        self._peers = {rank: _Peer() for rank in range(self._ranks) if rank != self._rank}
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._beats = 0

    def __enter__(self) -> PeerWatch:
        if self._ranks > 1:
            self._store = self._connect()
            self._speak()
            dist.barrier()  # everyone has spoken: nobody waits for a name that is not there yet
            self._listen()
            self._thread = threading.Thread(target=self._watch, name="peer watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._ranks == 1:
            return
        lost = None
        try:
            if error is None:
                dist.barrier()  # rank 0 may hold the store: it stays until all are done
            elif isinstance(error, (RuntimeError, dist.DistError)) and _FAILED_COLLECTIVE.search(str(error)):
                lost = self._who_is_lost() or [f"a peer closed the connection ({str(error).splitlines()[0][:200]})"]
            else:
                with contextlib.suppress(RuntimeError, dist.DistError):  # the store's holder may have ended alike
                    self._speak(str(error).splitlines()[0] if str(error) else kind.__name__)
        except (RuntimeError, dist.DistError) as failure:
            lost = self._who_is_lost() or [f"a peer closed the connection ({str(failure).splitlines()[0][:200]})"]
        finally:
            self._finished.set()
        if lost:
            self._stop(lost)

    def _connect(self) -> dist.Store:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=max(1.0, self._interval * 2)),
            wait_for_workers=False,
        )
        return dist.PrefixStore(f"megachiar/watch/{attempt}", store)

    def _watch(self) -> None:
        while not self._finished.wait(self._interval):
            try:
                self._speak()
                self._listen()
                lost = self._silent(self._timeout)
            except (RuntimeError, dist.DistError):
                lost = [self._describe(0, "is gone, and with it the rendezvous")]
            gone = [rank for rank, peer in self._peers.items() if peer.farewell is not None]
            if gone and not self._finished.wait(_GRACE_S):
                lost = [self._describe(rank, f"ended with: {self._peers[rank].farewell}") for rank in gone]
            lost = self._verdict() or lost
            if lost and not self._finished.is_set():
                self._stop(lost)

    def _who_is_lost(self) -> list[str]:
        """Those who fall silent, or have said why they ended, within a few beats of a failed collective."""
        until = time.monotonic() + 4 * self._interval + _GRACE_S
        while time.monotonic() < until:
            time.sleep(self._interval / 2)
            try:
                self._listen()
            except (RuntimeError, dist.DistError):
                return [self._describe(0, "is gone, and with it the rendezvous")] if self._rank else []
            if verdict := self._verdict():
                return verdict
            told = [rank for rank, peer in self._peers.items() if peer.farewell is not None]
            if told:
                return [self._describe(rank, f"ended with: {self._peers[rank].farewell}") for rank in told]
            if silent := self._silent(3 * self._interval):
                return silent
        return []

    def _speak(self, farewell: str | None = None) -> None:
        with self._lock:
            self._beats += 1
            words = [socket.gethostname(), str(os.getpid()), str(self._beats), *([farewell] if farewell else [])]
            self._store.set(str(self._rank), "\t".join(words))

    def _listen(self) -> None:
        with self._lock:
            said = self._store.multi_get([str(rank) for rank in self._peers])
        now = time.monotonic()
        for peer, words in zip(self._peers.values(), said, strict=True):
            if peer.said != (text := words.decode(errors="replace")):
                peer.said, peer.heard = text, now

    def _verdict(self) -> list[str]:
        """Who is lost by the word of the rank that found out first: all say the same."""
        try:
            with self._lock:
                known = self._store.check(["verdict"])
                return [self._store.get("verdict").decode(errors="replace")] if known else []
        except (RuntimeError, dist.DistError):
            return []

    def _stop(self, lost: list[str]) -> NoReturn:
        """Tell and end: an orderly end would wait for process groups that wait for the lost rank."""
        self._finished.set()
        with contextlib.suppress(RuntimeError, dist.DistError), self._lock:
            self._store.set("verdict", "; ".join(lost))
        self._tell(lost)
        if self._rank == 0:  # the store may end with this process: let the others read why
            time.sleep(3 * self._interval + 1)
        sys.stderr.flush()
        os._exit(EXIT_PEER_LOST)

    def _silent(self, limit: float) -> list[str]:
        now = time.monotonic()
        return [
            self._describe(rank, f"is gone: nothing was heard of it for {now - peer.heard:.0f} s")
            for rank, peer in self._peers.items()
            if now - peer.heard > limit
        ]

    def _describe(self, rank: int, what: str) -> str:
        peer = self._peers.get(rank)
        return f"rank {rank}{f' ({peer.place})' if peer else ''} {what}"

    def _tell(self, lost: list[str]) -> None:
        message = str(UserError(f"rank {self._rank} stops", "; ".join(lost), _REMEDY))
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(message)}")
