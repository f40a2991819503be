"""What a rank tells the others every few seconds: that it lives, what it does and how far it is."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass

from megachiar.activity import Activity
from megachiar.training.waiting import describe_wait, main_thread_line, wait_of


@dataclass(frozen=True)
class FailedCollective:
    """A collective that raised an error on this rank.

    Attributes:
        message: the first line of the error.
        wait: the collective, as ``describe_wait`` names it; None if its frame is not known.
    """

    message: str
    wait: str | None

    @classmethod
    def of(cls, error: BaseException) -> FailedCollective:
        """Return what an error tells of the collective that raised it."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        wait = wait_of(trace.tb_frame) if trace is not None else None
        return cls(str(error).splitlines()[0][:200] if str(error) else type(error).__name__, wait)


@dataclass(frozen=True)
class Heartbeat:
    """A rank as it described itself last.

    Attributes:
        host, pid: its process.
        number: of this heartbeat; two of one rank differ.
        doing: what its main thread does, to be read after "rank 3".
        place: step, stage and item; of two ranks the one with the smaller place is behind.
        count: grows as long as the main thread makes progress.
        wait: the collective in which its main thread waits for other ranks; None if it does not.
        line: the line of code that its main thread is at.
        steps, step_seconds, waited_seconds: of ``Activity``.
        failed: how a collective failed on this rank; None if none did.
        end: the error with which this rank ends; None as long as it works.
    """

    host: str = "?"
    pid: int = 0
    number: int = 0
    doing: str = ""
    place: tuple[int, ...] = ()
    count: int = 0
    wait: str | None = None
    line: str = ""
    steps: int = 0
    step_seconds: float = 0.0
    waited_seconds: float = 0.0
    failed: str | None = None
    end: str | None = None

    @classmethod
    def current(
        cls,
        activity: Activity,
        number: int = 0,
        failed: FailedCollective | None = None,
        end: str | None = None,
    ) -> Heartbeat:
        """Return this rank's heartbeat."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            number=number,
            doing=activity.doing,
            place=activity.place,
            count=activity.count,
            wait=failed.wait if failed else describe_wait(),
            line=main_thread_line(),
            steps=activity.steps,
            step_seconds=activity.step_seconds,
            waited_seconds=activity.waited_seconds,
            failed=failed.message if failed else None,
            end=end,
        )

    @classmethod
    def from_json(cls, message: str) -> Heartbeat:
        """Return the heartbeat that ``to_json`` made a message of; an empty message is that of an unknown process."""
        if not message:
            return cls()
        fields = json.loads(message)
        return cls(**{**fields, "place": tuple(fields["place"])})

    def to_json(self) -> str:
        """Return the message for the store."""
        return json.dumps(asdict(self))

    @property
    def process(self) -> str:
        """Host and process id."""
        return f"{self.host}, process {self.pid}"

    @property
    def step(self) -> int:
        """The step that the rank works on."""
        return self.place[0] if self.place else 0
