"""Start ranks by forking one process that has imported torch, DeepSpeed and training, which saves seconds for each.

    python rank_server.py SOCKET          the descriptor of a Unix socket

Each message asks for a rank: JSON {"arguments", "cwd", "env"}, with four file descriptors. Two are the rank's standard
output and standard error. To the third the server writes the rank's process id and, after its end, its exit code, each
on a line. The fourth holds the rank back until it is at its end: ranks of one run begin together. The rank does what
``python ARGUMENTS`` does up to the end of the interpreter. Ranks share nothing but what was imported before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import selectors
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from megachiar import launch

LARGEST_MESSAGE = 2**18


@dataclass(frozen=True)
class Rank:
    """A forked rank.

    Attributes:
        pid: its process id.
        process: a descriptor of its process (pidfd), which becomes readable when the process has ended.
        status: the descriptor to which its process id and then its exit code are written.
    """

    pid: int
    process: int
    status: int

    def report_end(self) -> None:
        """Write the exit code of this rank, which has ended."""
        _, status = os.waitpid(self.pid, 0)
        write_number(self.status, os.waitstatus_to_exitcode(status))

    def close(self) -> None:
        os.close(self.process)
        os.close(self.status)


def serve(requests: socket.socket) -> dict | None:
    """Fork a rank for each message.

    Messages and ends of ranks are events of one loop, each handled before the next. A signal handler would not do,
    because the signal of another rank's end interrupts it.

    Returns:
        In a rank, its message; in the server, None once the other end of the socket is closed.
    """
    ranks: dict[int, Rank] = {}
    with selectors.DefaultSelector() as events:
        events.register(requests, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in events.select()}
            for process in ready & ranks.keys():
                events.unregister(process)
                rank = ranks.pop(process)
                rank.report_end()
                rank.close()
            if requests.fileno() in ready:
                message, descriptors, _, _ = socket.recv_fds(requests, LARGEST_MESSAGE, 4)
                if not message:
                    return None
                rank = fork(*descriptors)
                if rank is None:
                    for other in ranks.values():
                        other.close()
                    return {**json.loads(message), "gate": descriptors[-1]}
                ranks[rank.process] = rank
                events.register(rank.process, selectors.EVENT_READ)


def fork(output: int, errors: int, status: int, gate: int) -> Rank | None:
    """Fork a rank whose standard output and error are those given; returns None in the rank, which keeps ``gate``."""
    pid = os.fork()
    if pid:
        write_number(status, pid)
        os.close(gate)
    else:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.close(status)
    os.close(output)
    os.close(errors)
    return Rank(pid, os.pidfd_open(pid), status) if pid else None


def write_number(descriptor: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the reader is gone
        os.write(descriptor, f"{number}\n".encode())


def become(arguments: list[str], cwd: str, env: dict[str, str], gate: int) -> None:
    """Run ``python ARGUMENTS`` in this process, once ``gate`` is at its end: ``-m MODULE ...`` or ``FILE ...``."""
    os.read(gate, 1)
    os.close(gate)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], cwd
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent.absolute())
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    launch.quiet_deepspeed()
    import megachiar.training.run  # noqa: F401

    gc.freeze()  # no rank collects what is imported: a rank's end would take a second instead of a third of one

    with socket.socket(fileno=int(sys.argv[1])) as requests_socket:
        request = serve(requests_socket)
    if request is not None:
        become(**request)
