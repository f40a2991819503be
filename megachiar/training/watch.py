"""When a rank is lost, the other ranks name it and stop.

A collective waits for every rank. Where one was killed, gloo fails with a message that names no rank, and NCCL waits.
So each rank has a thread that writes a heartbeat to the run's rendezvous store (at MASTER_ADDR:MASTER_PORT) every few
seconds, and reads the heartbeats of the others. A process that is stopped or swapped out sends none either. A process
that hangs in a collective still sends them; the collective's own timeout ends it.

Each heartbeat costs two small messages, on a thread that sleeps in between.
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
_REMEDY = "look at that rank's own output; started again, the run continues from its last checkpoint"
_GRACE_S = 3.0
"""Seconds for this process to raise its own error, after a peer that ended has sent the reason of its end."""
_LOST_STORE = "is gone, and with it the rendezvous"


@dataclass
class _Peer:
    """What this rank knows of another one.

    Attributes:
        heartbeat: the peer's newest heartbeat: host, process id, number and, when the peer ends, its reason, with tabs
            in between.
        received: time at which this process first read that heartbeat, in seconds of this process's monotonic clock.
    """

    heartbeat: str = ""
    received: float = 0.0

    @property
    def process(self) -> str:
        """Host and process id."""
        host, pid = (self.heartbeat.split("\t") + ["?", "?"])[:2]
        return f"{host}, process {pid}"

    @property
    def end_reason(self) -> str | None:
        """The error with which the peer ended, if it could send it; else None."""
        parts = self.heartbeat.split("\t", 3)
        return parts[3] if len(parts) > 3 else None


class PeerWatch:
    """Context in which the ranks of a run watch one another.

    A rank that loses another one prints which, and ends its process with ``EXIT_PEER_LOST``.

    Args:
        topology: of the run; a run of one rank is not watched.
        timeout_s: a rank counts as lost after so many seconds without a heartbeat.
    """

    def __init__(self, topology: Topology, timeout_s: float):
        self._rank = topology.rank
        self._ranks = topology.world_size
        self._timeout = timeout_s
        self._interval = min(2.0, timeout_s / 5)
        self._peers = {rank: _Peer() for rank in range(self._ranks) if rank != self._rank}
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._sent = 0

    def __enter__(self) -> PeerWatch:
        if self._ranks > 1:
            self._store = self._connect()
            self._send_heartbeat()
            dist.barrier()  # every rank has sent one: reading the key of a rank never waits for it to exist
            self._read_heartbeats()
            self._thread = threading.Thread(target=self._watch, name="peer watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._ranks == 1:
            return
        lost: list[str] = []
        try:
            if error is None:
                dist.barrier()  # rank 0 may hold the store, so that it stays until all ranks are done
            elif isinstance(error, (RuntimeError, dist.DistError)) and _FAILED_COLLECTIVE.search(str(error)):
                lost = self._find_lost() or [_closed_connection(error)]
            else:
                with contextlib.suppress(RuntimeError, dist.DistError):  # the rank that holds the store may be gone
                    self._send_heartbeat(str(error).splitlines()[0] if str(error) else type(error).__name__)
        except (RuntimeError, dist.DistError) as failure:
            lost = self._find_lost() or [_closed_connection(failure)]
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
        """Send and read heartbeats until the context ends or a rank is lost; the thread runs this method."""
        while not self._finished.wait(self._interval):
            try:
                self._send_heartbeat()
                self._read_heartbeats()
                lost = self._silent(self._timeout)
            except (RuntimeError, dist.DistError):
                lost = [self._describe(0, _LOST_STORE)]
            ended = self._ended()
            if ended and not self._finished.wait(_GRACE_S):
                lost = ended
            lost = self._verdict() or lost
            if lost and not self._finished.is_set():
                self._stop(lost)

    def _find_lost(self) -> list[str]:
        """Return which ranks fall silent or send why they ended, within a few heartbeats of a failed collective."""
        until = time.monotonic() + 4 * self._interval + _GRACE_S
        while time.monotonic() < until:
            time.sleep(self._interval / 2)
            try:
                self._read_heartbeats()
            except (RuntimeError, dist.DistError):
                return [self._describe(0, _LOST_STORE)] if self._rank else []
            if lost := self._verdict() or self._ended() or self._silent(3 * self._interval):
                return lost
        return []

    def _send_heartbeat(self, end_reason: str | None = None) -> None:
        with self._lock:
            self._sent += 1
            parts = [socket.gethostname(), str(os.getpid()), str(self._sent)]
            parts += [end_reason] if end_reason else []
            self._store.set(str(self._rank), "\t".join(parts))

    def _read_heartbeats(self) -> None:
        with self._lock:
            heartbeats = self._store.multi_get([str(rank) for rank in self._peers])
        now = time.monotonic()
        for peer, heartbeat in zip(self._peers.values(), heartbeats, strict=True):
            if peer.heartbeat != (text := heartbeat.decode(errors="replace")):
                peer.heartbeat, peer.received = text, now

    def _verdict(self) -> list[str]:
        """Return who is lost according to the rank that found out first, so that all ranks print the same."""
        try:
            with self._lock:
                known = self._store.check(["verdict"])
                return [self._store.get("verdict").decode(errors="replace")] if known else []
        except (RuntimeError, dist.DistError):
            return []

    def _stop(self, lost: list[str]) -> NoReturn:
        """Print who is lost and end the process at once.

        An orderly end would wait for process groups, which wait for the lost rank.
        """
        self._finished.set()
        with contextlib.suppress(RuntimeError, dist.DistError), self._lock:
            self._store.set("verdict", "; ".join(lost))
        self._print(lost)
        if self._rank == 0:  # the store may end with this process: the others need time to read the verdict
            time.sleep(3 * self._interval + 1)
        sys.stderr.flush()
        os._exit(EXIT_PEER_LOST)

    def _ended(self) -> list[str]:
        """Return which ranks ended with an error that they sent."""
        reasons = {rank: peer.end_reason for rank, peer in self._peers.items()}
        return [self._describe(rank, f"ended with: {why}") for rank, why in reasons.items() if why is not None]

    def _silent(self, limit: float) -> list[str]:
        """Return which ranks have sent no heartbeat for ``limit`` seconds."""
        now = time.monotonic()
        return [
            self._describe(rank, f"is gone: it sent no heartbeat for {now - peer.received:.0f} s")
            for rank, peer in self._peers.items()
            if now - peer.received > limit
        ]

    def _describe(self, rank: int, what: str) -> str:
        peer = self._peers.get(rank)
        return f"rank {rank}{f' ({peer.process})' if peer else ''} {what}"

    def _print(self, lost: list[str]) -> None:
        message = str(UserError(f"rank {self._rank} stops", "; ".join(lost), _REMEDY))
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(message)}")


def _closed_connection(error: BaseException) -> str:
    return f"a peer closed the connection ({str(error).splitlines()[0][:200]})"
