"""When a rank is lost or stands still, the ranks name it, write their stacks and stop.

A collective waits for every rank. Where one was killed, gloo fails with a message that names no rank, and NCCL waits.
So each rank has two threads. One exchanges heartbeats through the run's rendezvous store (at MASTER_ADDR:MASTER_PORT):

    rank 0          reads the heartbeats of all ranks, and writes the verdict: who is lost, who waits where
    other ranks     read rank 0's heartbeat, the verdict, and requests for stacks

The other thread, the watch, makes no call that can wait. It looks at what has come in and ends the process where

    a rank is silent        no heartbeat for the timeout: it was killed, is stopped or swapped out
    a rank has ended        with an error that it sent
    a rank stands still     its heart beats, but its main thread makes no progress while others wait for it
    the store is silent     no exchange for the timeout: the process that holds the store is stopped

The watch counts time by its own ticks. Where all ranks were suspended and go on, none has missed a heartbeat.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from megachiar.activity import Activity, Stage
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.last_words import print_last_words
from megachiar.stop_signals import StopSignals
from megachiar.topology import Topology
from megachiar.training import stalls
from megachiar.training.heartbeat import FailedCollective, Heartbeat
from megachiar.training.stacks import StackWriter, read_request
from megachiar.training.step_times import StepTimes, Straggler
from megachiar.training.store_exchange import StoreExchange

EXIT_PEER_LOST = 1
_FAILED_COLLECTIVE = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Broken pipe|[Tt]imed out|TCPStore|recvValue", re.DOTALL
)
_REMEDY = "look at that rank's own output; started again, the run continues from its last checkpoint"
_GRACE_S = 3.0
"""Seconds for this process to raise its own error, after a peer that ended has sent the reason of its end."""
_NAMED = 8  # ranks that a message names one by one
_VERDICT, _REQUEST = "verdict", "stacks"


class _Peer:
    """What this rank knows of one rank, its own included: the newest heartbeat, and since when it stands still.

    Times are those of the watch's clock.
    """

    def __init__(self) -> None:
        self.beat = Heartbeat()
        self.heard = 0.0
        self.progressed = 0.0

    def hear(self, beat: Heartbeat, now: float) -> None:
        if beat == self.beat:
            return
        if (beat.count, beat.place) != (self.beat.count, self.beat.place):
            self.progressed = now
        elif beat.wait is None:  # a collective that has just failed: what the rank waited for is still worth knowing
            beat = replace(beat, wait=self.beat.wait)
        self.beat, self.heard = beat, now


class PeerWatch:
    """Context in which the ranks of a run watch one another.

    A rank that loses another one prints which, and ends its process with ``EXIT_PEER_LOST``.

    Args:
        topology: of the run; of a run of one rank only requests for stacks are watched.
        timeout_s: a rank counts as lost after so many seconds without a heartbeat, or without progress while others
            wait for it.
        activity: of this rank's main thread.
        signals: that stop the run. A peer that is lost after one of them, before the first step, has stopped too.
    """

    def __init__(self, topology: Topology, timeout_s: float, activity: Activity, signals: StopSignals):
        self._rank = topology.rank
        self._ranks = topology.world_size
        self._timeout = timeout_s
        # A little earlier than the collectives give up: the stacks still show which of them waits.
        self._limit = timeout_s - min(timeout_s / 4, 10.0)
        # Rank 0 reads one message a rank: with thousands of ranks less often, to leave it time to train.
        self._interval = min(max(2.0, self._ranks / 1000), timeout_s / 10)
        self._activity = activity
        self._signals = signals
        self._stacks = StackWriter(topology.rank)
        signals.before_suspension = self._stacks.hold_timer
        self._answered = ""
        self._before_exit: list[Callable[[], None]] = []
        self._finished = threading.Event()
        self._stopping = threading.Lock()
        self._clock = 0.0
        self._suspended_s = 0.0
        self._rounds, self._exchanged = 0, 0.0
        self._sent = 0
        self._failed: FailedCollective | None = None
        self._failed_at: float | None = None
        self._end: str | None = None
        peers = range(self._ranks) if topology.is_main else (0,)
        self._peers = {rank: _Peer() for rank in peers}
        self._step_times = StepTimes(topology)
        keys = [*(str(rank) for rank in peers), _VERDICT, _REQUEST]
        self._exchange = StoreExchange(keys, str(self._rank), self._heartbeat, self._interval)

    def __enter__(self) -> PeerWatch:
        if self._ranks > 1:
            if self._rank == 0:
                self._exchange.put(_VERDICT, "")
                self._exchange.put(_REQUEST, "")
            self._exchange.start()
            if not self._exchange.flush(self._timeout):
                reason = self._exchange.error or f"no answer for {self._timeout:.0f} s"
                self._stop([self._describe_store(reason)])
            try:
                dist.barrier()  # every rank has sent one: reading the key of a rank never waits for it to exist
            except (RuntimeError, dist.DistError) as error:
                self._failed = FailedCollective.of(error)
                self._stop([self._closed_connection()])
            self._exchange.start_reading()
            self._exchange.flush(self._timeout)  # each rank knows rank 0's process, to name it if it is lost at once
        threading.Thread(target=self._watch, name="peer watch", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._ranks > 1:
            try:
                if error is None:
                    self._activity.begin("has finished", Stage.END, self._activity.step)
                    dist.barrier()  # rank 0 may hold the store, so that it stays until all ranks are done
                elif isinstance(error, (RuntimeError, dist.DistError)) and _FAILED_COLLECTIVE.search(str(error)):
                    self._await_verdict(error)
                else:
                    self._send_end(error)
            except (RuntimeError, dist.DistError) as failure:
                self._await_verdict(failure)
        self._finished.set()
        if self._ranks > 1:
            self._exchange.end(self._interval)
        self._stacks.close()

    def use_run_folder(self, run: Path, before_exit: Callable[[], None] | None) -> None:
        """Write stacks to the run folder from now on, should there be a reason to.

        Args:
            run: the run folder.
            before_exit: is called before the watch ends the process.
        """
        if before_exit is not None:
            self._before_exit.append(before_exit)
        self._answered = read_request(run)
        self._stacks.run = run

    def open_stacks(self) -> None:
        """Open this rank's file of stacks, now that the run begins and the folder is there on all ranks."""
        self._stacks.open()

    def straggler(self) -> Straggler | None:
        """Return the rank that held the others up most since the last call, on rank 0; None if it cannot be told."""
        return self._step_times.straggler({rank: peer.beat for rank, peer in self._peers.items()})

    def _heartbeat(self) -> str:
        self._sent += 1
        return Heartbeat.current(self._activity, self._sent, self._failed, self._end).to_json()

    def _watch(self) -> None:
        """Look at what has come in, until the context ends or a rank is lost; the thread runs this method."""
        last = time.monotonic()
        while not self._finished.wait(self._interval):
            now = time.monotonic()
            self._clock += min(now - last, max(2 * self._interval, 1.0))
            if now - last > self._limit:
                self._suspended_s = now - last
            last = now
            self._answer_request()
            if self._ranks > 1:
                self._stacks.wind_up(1.25 * self._timeout + 5)
                lost = self._look()
                if lost and not self._finished.is_set():
                    self._stop(lost)

    def _look(self) -> list[str]:
        """Return who is lost, as one description or several; empty if the run goes on."""
        values = self._exchange.values
        for rank, peer in self._peers.items():
            if str(rank) in values:
                peer.hear(Heartbeat.from_json(values[str(rank)]), self._clock)
        if values.get(_VERDICT):
            return [values[_VERDICT]]
        if self._exchange.error is not None:
            return [self._describe_store(self._exchange.error)]
        if self._exchange.rounds != self._rounds:
            self._rounds, self._exchanged = self._exchange.rounds, self._clock
        if (silent := self._clock - self._exchanged) > self._limit:
            return [self._describe_store(f"no answer for {silent:.0f} s")]
        if ended := self._ended():
            return ended if not self._finished.wait(_GRACE_S) else []
        if lost := self._silent(self._silence_limit()):
            return lost
        return self._stalled() if self._rank == 0 else self._gave_up()

    def _silence_limit(self) -> float:
        """Return the seconds without heartbeat after which a rank is lost: few, once a collective has failed."""
        failed = self._failed or any(peer.beat.failed for peer in self._peers.values())
        return min(self._limit, 4 * self._interval + 1) if failed else self._limit

    def _ended(self) -> list[str]:
        """Return which ranks ended with an error that they sent."""
        ended = {rank: peer.beat for rank, peer in self._peers.items() if rank != self._rank and peer.beat.end}
        return [stalls.describe_rank(rank, beat, f"ended with: {beat.end}") for rank, beat in ended.items()][:_NAMED]

    def _silent(self, limit: float) -> list[str]:
        """Return which ranks have sent no heartbeat for ``limit`` seconds."""
        silent = {
            rank: self._clock - peer.heard
            for rank, peer in self._peers.items()
            if rank != self._rank and peer.beat.pid and self._clock - peer.heard > limit
        }
        lines = []
        for rank, seconds in silent.items():
            beat = self._peers[rank].beat
            what = f"is gone: it sent no heartbeat for {seconds:.0f} s{stalls.describe_state(beat)}"
            lines.append(stalls.describe_rank(rank, beat, what))
        return self._with_others(lines, silent)

    def _stalled(self) -> list[str]:
        """Return which ranks hold the others up; rank 0 alone can tell."""
        beats = {rank: peer.beat for rank, peer in self._peers.items() if peer.beat.pid}
        still = {rank: self._clock - peer.progressed for rank, peer in self._peers.items()}
        if len(beats) < self._ranks:
            return []
        ranks = stalls.find_stalled(beats, still, self._limit)
        if not ranks and self._patience_is_over():
            ranks = stalls.find_culprits(beats)
            if not ranks:
                return [self._closed_connection()]
        lines = [stalls.describe_stall(rank, beats[rank], still[rank]) for rank in ranks]
        return self._with_others(lines, ranks)

    def _patience_is_over(self) -> bool:
        """Return whether a collective failed so long ago that no rank that was killed can still go unnoticed."""
        if self._failed is None and not any(peer.beat.failed for peer in self._peers.values()):
            return False
        if self._failed_at is None:
            self._failed_at = self._clock
        return self._clock - self._failed_at > 8 * self._interval + _GRACE_S

    def _gave_up(self) -> list[str]:
        """Return what this rank knows, where a collective failed here and rank 0 says nothing."""
        if self._failed is None or not self._patience_is_over():
            return []
        assert self._failed_at is not None
        slack = 4 * self._interval + _GRACE_S  # rank 0 learns of the failure later than this rank
        return [self._closed_connection()] if self._clock - self._failed_at > 8 * self._interval + 2 * slack else []

    def _with_others(self, lines: list[str], named: object) -> list[str]:
        """Return the lines, shortened, with what the ranks do that are not named."""
        if not lines:
            return []
        beats = {rank: peer.beat for rank, peer in self._peers.items()}
        if self._rank not in beats:
            beats[self._rank] = Heartbeat.current(self._activity, failed=self._failed)
        others = stalls.describe_others(beats, set(named))  # type: ignore[call-overload]
        more = [f"and {len(lines) - _NAMED} more ranks"] if len(lines) > _NAMED else []
        return [*lines[:_NAMED], *more, *([others] if others else [])]

    def _closed_connection(self) -> str:
        why = self._failed.message if self._failed else "another rank says so"
        return f"a peer closed the connection ({why})"

    def _describe_store(self, reason: str) -> str:
        """Return who holds the store that does not answer."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or self._rank == 0:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            return f"the rendezvous at {place} is gone ({reason})"
        beat = self._peers[0].beat
        what = f"is gone, and with it the rendezvous ({reason}){stalls.describe_state(beat)}"
        return "; ".join(self._with_others([stalls.describe_rank(0, beat, what)], [0]))

    def _answer_request(self) -> None:
        """Write stacks if `megachiar stacks` asks for them: rank 0 sees the file, and passes it on to the others."""
        if self._rank == 0:
            token = read_request(run) if (run := self._stacks.run) is not None else ""
            if token and token != self._answered and self._ranks > 1:
                self._exchange.put(_REQUEST, token)
        else:
            token = self._exchange.values.get(_REQUEST, "")
        if token and token != self._answered and self._stacks.run is not None:
            self._answered = token
            self._stacks.write(self._own_words(), f"asked for, {token}")

    def _own_words(self) -> str:
        return stalls.describe_activity(Heartbeat.current(self._activity, failed=self._failed))

    def _send_end(self, error: BaseException) -> None:
        """Tell the others why this rank ends; rank 0, which may hold the store, gives them time to read it."""
        self._end = str(error).splitlines()[0] if str(error) else type(error).__name__
        sent = self._exchange.flush(_GRACE_S)
        if sent and self._rank == 0 and not getattr(error, "same_on_every_rank", False):
            time.sleep(3 * self._interval)

    def _await_verdict(self, error: BaseException) -> NoReturn:
        """Wait for the watch to find out who is lost, after a collective failed; it ends this process."""
        self._failed = FailedCollective.of(error)
        self._stacks.write_failure(error)
        time.sleep(20 * self._interval + 4 * _GRACE_S)
        self._stop([self._closed_connection()])

    def _stop(self, lost: list[str]) -> NoReturn:
        """Write the stacks, print who is lost and end the process at once.

        An orderly end would wait for process groups, which wait for the lost rank.
        """
        if not self._stopping.acquire(blocking=False):
            time.sleep(3600)  # the other thread ends the process
        self._finished.set()
        if self._suspended_s:
            seconds = f"{self._suspended_s:.0f} s"
            lost = [*lost, f"this rank was suspended for {seconds}, training.communication_timeout_s is less"]
        verdict = "; ".join(lost)
        self._stacks.write(self._own_words(), verdict)
        self._print(verdict)
        for function in self._before_exit:
            with contextlib.suppress(Exception):
                function()
        if self._rank == 0 and self._ranks > 1:  # the store may end with this process: the others must read it before
            self._exchange.put(_VERDICT, verdict)
            self._exchange.flush(3 * self._interval + 1)
            time.sleep(3 * self._interval)
        sys.stderr.flush()
        stopped = self._signals.received is not None and self._activity.step == 0
        os._exit(EXIT_STOPPED if stopped else EXIT_PEER_LOST)

    def _print(self, verdict: str) -> None:
        where = f"; stacks: {self._stacks.run / 'stacks'}" if self._stacks.run is not None else ""
        message = str(UserError(f"rank {self._rank} stops", verdict, f"{_REMEDY}{where}"))
        label = "\x1b[1;31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
        print_last_words(f"{label} {message}")
