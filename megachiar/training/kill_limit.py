"""Say it where a save takes longer than a launcher leaves between SIGTERM and SIGKILL.

torchrun and DeepSpeed's launcher pass SIGTERM and Ctrl-C on, and kill what still runs after a while.
"""

from __future__ import annotations

import os

DEFAULT_S = 30.0
"""Seconds that torchrun (unless told otherwise) and DeepSpeed's launcher wait."""


class KillLimit:
    """Compares what a save takes with what the launcher of this process allows; it says so once."""

    def __init__(self) -> None:
        self._said = False

    def line(self, save_s: float) -> str | None:
        """Return the line for the log after a save of so many seconds; None if there is nothing new to say."""
        limit = self._limit()
        if limit is None or self._said or save_s < limit[1]:
            return None
        self._said = True
        launcher, seconds, remedy = limit
        return f"a save takes {save_s:.0f} s, but {launcher} kills ranks {seconds:.0f} s after a signal: {remedy}"

    @staticmethod
    def _limit() -> tuple[str, float, str] | None:
        env = os.environ
        if "TORCHELASTIC_RUN_ID" in env:
            seconds = float(env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", DEFAULT_S))
            return "torchrun", seconds, "set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to more seconds where torchrun starts"
        if "CROSS_RANK" in env:
            return "deepspeed", DEFAULT_S, "send SIGUSR1 to a rank instead, or set training.stop_after"
        return None
