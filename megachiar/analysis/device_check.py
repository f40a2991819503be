"""Check and time a GPU within a fixed time: part by part, with one JSON file and one table at any moment.

    | tests   | steps | layers | steps | ... |      a part ends early: those behind it share what it left
    |-- its share --x                               a part is too slow: it is ended, and the next one starts
                                       | left out   a part has less time than it needs: it is named, and not started

No part can take another's time or stop another. What failed, with the end of its messages, is in the JSON.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from megachiar import __version__
from megachiar.analysis.device_parts import RESULT, Part
from megachiar.analysis.device_table import table
from megachiar.checkout import own_commit

DONE, FAILED, TIMED_OUT, LEFT_OUT = "done", "failed", "timed out", "left out"
_RESERVE_S = 5.0
"""Time that is kept for the end of a slow part and for the last files."""
_END_OF_MESSAGES = 2000
"""Characters of a failed part's messages that are kept."""


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        name, kind: of the part.
        command: that was run.
        state: ``done``, ``failed``, ``timed out`` or ``left out``.
        limit_s: seconds that it had.
        seconds: that it took.
        error: the end of its messages, or why it was left out; None where it is done.
        result: what it wrote, also before it failed; None if nothing.
    """

    name: str
    kind: str
    command: list[str]
    state: str
    limit_s: float
    seconds: float
    error: str | None
    result: dict[str, Any] | None


def check_device(
    parts: Sequence[Part],
    *,
    seconds: float,
    folder: Path,
    root: Path,
    rehearse: bool,
) -> bool:
    """Run the parts and write ``device_check.json`` and ``device_check.md`` to ``folder`` after each.

    Args:
        parts: in the order of importance.
        seconds: for all parts together.
        folder: is made if it is not there.
        root: folder that the commands run in.
        rehearse: whether no GPU is to be used.

    Returns:
        Whether no part failed or timed out.
    """
    began = time.monotonic()
    machine, outcomes = describe_machine(rehearse), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        left = seconds - _RESERVE_S - (time.monotonic() - began)
        limit = limit_of(parts[number:], left)
        if limit is None:
            outcome = _left_out(part, max(left, 0.0))
        else:
            print(f"{part.name}: at most {limit:.0f} s", flush=True)
            outcome = run_part(part, limit, root, {"CUDA_VISIBLE_DEVICES": ""} if rehearse else {})
        print(f"{part.name}: {outcome.state} after {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
        record = {
            "machine": machine,
            "rehearsal": rehearse,
            "limit_s": seconds,
            "seconds": time.monotonic() - began,
            "parts": [asdict(each) for each in outcomes],
        }
        (folder / "device_check.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "device_check.md").write_text(table(record))
    return all(outcome.state in (DONE, LEFT_OUT) for outcome in outcomes)


def limit_of(parts: Sequence[Part], left: float) -> float | None:
    """Return the seconds of the first of ``parts``, of the seconds that are left for all; None if it needs more."""
    first = parts[0]
    if left < first.least_s:
        return None
    return max(first.least_s, left * first.share / sum(part.share for part in parts))


def run_part(part: Part, limit: float, root: Path, environment: dict[str, str]) -> Outcome:
    """Run the command of a part for at most ``limit`` seconds, and end all processes that it has started.

    Args:
        part: to run.
        limit: in seconds.
        root: folder to run in.
        environment: variables that it gets beside those of this process.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "result"
        command = [sys.executable, *(word.replace(RESULT, str(written)) for word in part.words)]
        with (Path(temporary) / "messages").open("w+b") as messages:
            process = subprocess.Popen(
                command,
                cwd=root,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            messages.seek(0)
            said = messages.read().decode(errors="replace")
        result = _read(written, part.kind)
    return Outcome(
        name=part.name,
        kind=part.kind,
        command=["python", *part.words],
        state=TIMED_OUT if code is None else FAILED if code else DONE,
        limit_s=limit,
        seconds=time.monotonic() - began,
        error=None if code == 0 else said[-_END_OF_MESSAGES:].strip(),
        result=result,
    )


def _left_out(part: Part, left: float) -> Outcome:
    return Outcome(
        name=part.name,
        kind=part.kind,
        command=["python", *part.words],
        state=LEFT_OUT,
        limit_s=0.0,
        seconds=0.0,
        error=f"needs {part.least_s:.0f} s, and {left:.0f} s were left",
        result=None,
    )


def _read(path: Path, kind: str) -> dict[str, Any] | None:
    """Return what a command wrote, of tests how many there were of each kind; None where it wrote nothing whole."""
    try:
        if kind != "tests":
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        suites = list(ElementTree.parse(path).iter("testsuite"))
        return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in _COUNTS}
    except (OSError, ValueError, ElementTree.ParseError):
        return None


_COUNTS = ("tests", "failures", "errors", "skipped")


def describe_machine(rehearse: bool) -> dict[str, Any]:
    """Return what the check ran on: device, driver, versions of what computes, and the commit."""
    packages = ("torch", "triton", "deepspeed", "flash-attn", "liger-kernel")
    name, driver = (None, None) if rehearse else _nvidia_gpu()
    return {
        "device": name or f"CPU ({platform.machine()})",
        "driver": driver,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "megachiar": __version__,
        "commit": own_commit(),
        "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_gpu() -> tuple[str | None, str | None]:
    """Return the name of the first NVIDIA GPU and the version of its driver; None where no tool says them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None, None
    name, _, driver = done.stdout.partition("\n")[0].rpartition(", ")
    return name or None, driver or None
