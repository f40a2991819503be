"""A run goes on, and saves when it is told to stop, though nobody can read its log any more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, process_environment, small_config, write_config, write_tokens

from megachiar.checkpoint.format import complete_checkpoints
from megachiar.data.storage.files import bin_path
from megachiar.errors import EXIT_STOPPED
from megachiar.log_streams import LossyStream, lose_what_cannot_be_written

COMMAND = [sys.executable, "-m", "megachiar.pretrain"]


@pytest.fixture
def config(tmp_path) -> Path:
    write_tokens(tmp_path / "train")
    training = {"steps": 100_000, "global_batch_size": 4, "micro_batch_size": 4}
    config = small_config(tmp_path, training=training, checkpoint={"every": None})
    del config["data"]["validation"]
    return write_config(tmp_path / "config.yaml", config)


def wait_for_steps(process: subprocess.Popen, folder: Path) -> None:
    metrics, until = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    size = metrics.stat().st_size if metrics.exists() else 0
    while not (metrics.exists() and metrics.stat().st_size > size + 300):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGHUP), ids=lambda number: number.name)
def test_a_run_whose_log_has_lost_its_reader_saves_and_stops(config, number):
    """Ctrl-C in `megachiar pretrain ... 2>&1 | tee log` ends tee too."""
    reader, writer = os.pipe()
    with subprocess.Popen(
        [*COMMAND, "--config", config],
        stdout=writer,
        stderr=writer,
        cwd=ROOT,
        env=process_environment(),
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # in the background, or under nohup, it is ignored
    ) as process:
        try:
            os.close(writer)
            wait_for_steps(process, config.parent)
            os.close(reader)
            wait_for_steps(process, config.parent)
            process.send_signal(number)
            assert process.wait(60) == EXIT_STOPPED
        finally:
            process.kill()
    assert len(complete_checkpoints(config.parent / "run" / "checkpoints")) == 1


def test_a_run_ends_well_without_standard_streams_and_on_full_disks(config):
    with open("/dev/full", "w") as full:
        command = [*COMMAND, "--config", config, "--training.steps=3"]
        done = subprocess.run(command, stdout=full, stderr=full, cwd=ROOT, env=process_environment(), timeout=120)
    assert done.returncode == 0
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command, f"--logging.folder={config.parent / 'closed'}"]
    assert subprocess.run(closed, cwd=ROOT, env=process_environment(), timeout=120).returncode == 0
    assert (config.parent / "closed" / "metrics.jsonl").exists()


def test_a_crash_says_where(config):
    """A dataset that is cut while a run reads it ends the process: the system has no bytes to give."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*COMMAND, "--config", config], cwd=ROOT, env=process_environment(), **pipes) as process:
        wait_for_steps(process, config.parent)
        os.truncate(bin_path(config.parent / "train"), 0)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGBUS
    assert "Bus error" in output and "dataset.py" in output


def test_a_stream_loses_what_is_refused_and_is_the_stream_in_all_else(monkeypatch, tmp_path):
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (its end is refused too)
    stream = LossyStream(full)
    assert stream.write("lost\n") == 5 and stream.fileno() == full.fileno() and not stream.isatty()
    stream.flush()
    with contextlib.suppress(OSError):
        full.close()
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        monkeypatch.setattr(sys, "stderr", None)
        lose_what_cannot_be_written()
        lose_what_cannot_be_written()
        print("kept", flush=True)
        print("nowhere", file=sys.stderr)
    assert (tmp_path / "log").read_text() == "kept\n"
