"""Tell one process from all others, on this machine and on others, and tell whether it still runs.

A process id alone comes back after a while. With the time at which the process started, the boot of its machine and its
namespace of ids (a container has its own), it names one process for good.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessIdentity:
    """Which process, of which machine.

    Attributes:
        host: name of the machine.
        pid: process id.
        started: start of the process in clock ticks since the boot; None where the system does not tell.
        machine: boot id and namespace of process ids, which two processes share if each can see the other.
    """

    host: str
    pid: int
    started: int | None
    machine: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Return the identity of a process of this machine that runs."""
        return cls(socket.gethostname(), pid, _start_of(pid), _this_machine())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def seconds_since_boot(self) -> float | None:
        """Return when the process started, in seconds since the boot of its machine; None if it is not known."""
        return self.started / os.sysconf("SC_CLK_TCK") if self.started else None

    def runs(self) -> bool | None:
        """Return whether this process still runs; None if it belongs to a machine that cannot be looked at."""
        if self.machine != _this_machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it runs as another user
            pass
        if self.started is None:
            return True
        return _start_of(self.pid) == self.started


def parent_of(pid: int) -> int | None:
    """Return the id of a process's parent; None if the process has ended or the system does not tell."""
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def command_of(pid: int) -> str:
    """Return the command line of a process, empty if it cannot be read."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def state_of(pid: int) -> str | None:
    """Return the letter of a process's state, such as R or T; None if it has ended or the system does not tell."""
    fields = _stat(pid)
    return fields[0] if fields else None


def _start_of(pid: int) -> int | None:
    """Return the start of a process in clock ticks since the boot; None if it has ended, or only waits to be reaped."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _stat(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` from the third on, the state; empty if there are none."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()  # the second field, the name, may hold spaces and brackets


def _this_machine() -> str:
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return socket.gethostname()
