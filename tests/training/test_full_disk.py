"""Logs that a disk refuses are a warning, and the run goes on.

The system refuses for real: a process whose files may be no larger (RLIMIT_FSIZE) is told so in the middle of a record.
"""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator

import pytest
from support import python, small_config, write_config, write_tokens

from megachiar.training.metrics import MetricsWriter, read_metrics
from megachiar.training.trackers.points import Point
from megachiar.training.trackers.tensorboard_tracker import TensorBoardTracker


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_refused_records_are_counted_and_the_next_ones_are_written(tmp_path):
    said: list[str] = []
    writer = MetricsWriter(tmp_path, step=0, warn=said.append)
    writer.write(1, "train", {"loss": 1.0})
    with files_of_at_most((tmp_path / "metrics.jsonl").stat().st_size + 5):
        writer.write(2, "train", {"loss": 2.0})
        writer.write(3, "train", {"loss": 3.0})
        assert len(said) == 1 and f"{tmp_path / 'metrics.jsonl'} cannot be written: File too large" in said[0]
    writer.write(4, "train", {"loss": 4.0})
    writer.close()
    assert said[1:] == [f"{tmp_path / 'metrics.jsonl'} is written again; records that are missing: 2"]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 4]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_refused_event_files_are_an_error_without_a_traceback(tmp_path, capfd):
    tracker = TensorBoardTracker(tmp_path, 0)
    tracker.log(Point(1, {"loss": 1.0}))
    tracker._writer.flush()
    events = next(tmp_path.iterdir())
    with files_of_at_most(events.stat().st_size + 10), pytest.raises(OSError, match="File too large"):
        until = time.monotonic() + 20
        while time.monotonic() < until:
            tracker.log(Point(2, {f"curve {number}": 0.5 for number in range(200)}))
            tracker._writer.flush()
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_with_full_logs_trains_to_its_end(tmp_path):
    """The checkpoint is the largest file of this run, and it must fit: the limit is for what grows beyond it."""
    write_tokens(tmp_path / "train")
    sections = {"training": {"steps": 60, "micro_batch_size": 8}, "data": {"validation": {}}}
    config = small_config(tmp_path, **sections)
    path = write_config(tmp_path / "config.yaml", config)
    program = (
        "import resource, sys\n"
        "from megachiar.console import run\n"
        "from megachiar.pretrain import main\n"
        "from megachiar.training.trainer import Trainer\n"
        "train = Trainer._train\n"
        "def limited(self, *arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "    code = train(self, *arguments)\n"
        "    return code\n"
        "save = Trainer._save_if_due\n"
        "def unlimited(self, *arguments):\n"
        "    if self.progress.step == self.config.steps:\n"
        "        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "    return save(self, *arguments)\n"
        "Trainer._train, Trainer._save_if_due = limited, unlimited\n"
        "run(main)\n"
    )
    script = tmp_path / "limited.py"
    script.write_text(program)
    done = python(script, "--config", path, "--set", "logging.tensorboard=true")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "metrics.jsonl cannot be written: File too large. The run goes on" in output
    assert "step 60/60" in output and "saved" in output and "Traceback" not in output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > 2 and all(json.loads(line)["step"] for line in lines)
