"""When a rank is lost, the others stop in time and name it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support import small_config, start_ranks, write_config, write_tokens

TIMEOUT_S, MARGIN_S = 8, 25  # the margin allows for two cores that are busy with other work


@pytest.fixture
def run(tmp_path):
    write_tokens(tmp_path / "train")
    config = small_config(tmp_path, training={"communication_timeout_s": TIMEOUT_S, "steps": 100_000})
    del config["data"]["validation"]
    config["training"]["global_batch_size"] = 6
    return write_config(tmp_path / "config.yaml", config)


def started(run: Path, *arguments: str) -> list:
    """Start three ranks and wait until they have begun to train."""
    processes = start_ranks(3, "-m", "megachiar.pretrain", "--config", run, *arguments)
    metrics, until = run.parent / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 300):
        assert all(p.poll() is None for p in processes), [p.communicate()[0] for p in processes if p.poll() is not None]
        assert time.monotonic() < until
        time.sleep(0.05)
    return processes


def ended(processes: list, survivors: list[int], within: float) -> dict[int, str]:
    began = time.monotonic()
    try:
        outputs = {rank: processes[rank].communicate(timeout=within)[0] for rank in survivors}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert time.monotonic() - began < within
    for rank in survivors:
        assert processes[rank].returncode == 1, outputs[rank]
        assert "Traceback" not in outputs[rank], outputs[rank]
        assert "remedy:" in outputs[rank]
    return outputs


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_is_named_by_all_others(run, victim):
    processes = started(run)
    processes[victim].kill()
    survivors = [rank for rank in range(3) if rank != victim]
    outputs = ended(processes, survivors, TIMEOUT_S + MARGIN_S)
    for rank in survivors:
        assert f"rank {victim} ({os.uname().nodename}, process {processes[victim].pid}) is gone" in outputs[rank]


def test_a_rank_that_is_silent_is_given_up(run):
    processes = started(run)
    processes[2].send_signal(signal.SIGSTOP)
    outputs = ended(processes, [0, 1], TIMEOUT_S + MARGIN_S)
    for output in outputs.values():
        assert "rank 2 (" in output and "it sent no heartbeat for" in output


def test_a_rank_that_ends_with_an_error_of_its_own_is_quoted(run):
    """Rank 1 alone raises an error, and all others quote it."""
    sabotage = run.parent / "sabotage.py"
    sabotage.write_text(
        "import os, sys, time\n"
        "from megachiar.training import trainer\n"
        "from megachiar.errors import UserError\n"
        "step = trainer.Trainer._step\n"
        "def failing(self, loader):\n"
        "    if self.progress.step == 20 and os.environ['RANK'] == '1':\n"
        "        raise UserError('disk', 'is full', 'free some')\n"
        "    return step(self, loader)\n"
        "trainer.Trainer._step = failing\n"
        "from megachiar.console import run\n"
        "from megachiar.pretrain import main\n"
        "run(main)\n"
    )
    processes = start_ranks(3, sabotage, "--config", run)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[1].returncode == 2 and "disk: is full" in outputs[1]
    for rank in (0, 2):
        assert processes[rank].returncode == 1, outputs[rank]
        assert "rank 1 (" in outputs[rank] and "ended with: disk: is full" in outputs[rank], outputs[rank]
        assert "Traceback" not in outputs[rank]
