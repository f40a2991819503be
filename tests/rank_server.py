"""Starts ranks by forking one process that has imported torch, DeepSpeed and the training: seconds less for each.

python rank_server.py SOCKET          the descriptor of a Unix socket

Each message asks for a rank: JSON {"arguments", "cwd", "env"}, with three descriptors: the rank's standard output and
error, and where the number of its process and, after its end, its exit code are written, each a line. The rank does
what ``python ARGUMENTS`` does up to the interpreter's own end; it shares with others what was imported, no more.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

from megachiar import launch

LARGEST_MESSAGE = 2**18


def serve(requests: socket.socket) -> dict:
    """Fork a rank for each message; returns its message in the rank, and never in the server."""
    status_of: dict[int, int] = {}

    def reap(_number: int, _frame: object) -> None:
        while status_of:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            tell(status_of[pid], os.waitstatus_to_exitcode(status))
            os.close(status_of.pop(pid))

    signal.signal(signal.SIGCHLD, reap)
    while True:
        message, (output, errors, status), _, _ = socket.recv_fds(requests, LARGEST_MESSAGE, 3)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # until it is known whose end is told where
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (*status_of.values(), status):
                os.close(descriptor)
            os.dup2(output, 1)
            os.dup2(errors, 2)
        else:
            status_of[pid] = status
            tell(status, pid)
        os.close(output)
        os.close(errors)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        if not pid:
            return json.loads(message)


def tell(descriptor: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        os.write(descriptor, f"{number}\n".encode())


def become(arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    """Run ``python ARGUMENTS`` in this process: ``-m MODULE ...`` or ``FILE ...``."""
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
    import megachiar.training.setup  # noqa: F401

    gc.freeze()  # what is imported is no rank's to collect: its end would take a second instead of a third of one

    with socket.socket(fileno=int(sys.argv[1])) as asked:
        try:
            request = serve(asked)
        except ValueError:  # no descriptors: the other end was closed
            sys.exit()
    become(**request)
