"""When a rank is lost, the others stop in time and name it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import (
    ROOT,
    forked_python,
    process_environment,
    run_ranks,
    small_config,
    start_ranks,
    write_config,
    write_tokens,
)

from megachiar.errors import EXIT_STOPPED
from megachiar.process_identity import state_of
from megachiar.training.metrics import read_metrics
from megachiar.training.stacks import stack_path

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


HANGS = {
    "asleep": "time.sleep(600)",
    "endless loop": "while True: pass",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}


def hanging(run: Path, how: str, rank: int) -> Path:
    """Write a program that trains, but in which a rank hangs in the fourth step as it reads a sample."""
    program = run.parent / "hanging.py"
    program.write_text(
        "import os, signal, time\n"
        "from megachiar.data.sampling import loader\n"
        "read, count = loader.BatchLoader.__next__, 0\n"
        "def reading(self):\n"
        "    global count\n"
        "    count += 1\n"
        f"    if count == 4 and os.environ['RANK'] == '{rank}':\n"
        "        print('HANGS AT', time.monotonic(), flush=True)\n"
        f"        {HANGS[how]}\n"
        "    return read(self)\n"
        "loader.BatchLoader.__next__ = reading\n"
        "from megachiar.console import run\n"
        "from megachiar.pretrain import main\n"
        "run(main)\n"
    )
    return program


def outputs_and_seconds(processes: list, how: str, victim: int) -> tuple[dict[int, str], dict[int, float]]:
    """Return what each rank has printed that ends, and the seconds from the hang to its end."""
    ending = [rank for rank in range(len(processes)) if rank != victim or how != "stopped"]
    try:
        outputs, ends = outputs_and_ends(processes, ending)
    finally:
        for process in processes:
            process.kill()
    said = "".join([*outputs.values(), processes[victim].communicate()[0]])
    hung = float(re.search(r"HANGS AT (\S+)", said)[1])
    return outputs, {rank: end - hung for rank, end in ends.items()}


def outputs_and_ends(processes: list, ranks: list[int]) -> tuple[dict[int, str], dict[int, float]]:
    """Return what each of the ranks has printed, and when it had ended."""
    outputs, ends = {}, {}

    def wait(rank: int) -> None:
        outputs[rank] = processes[rank].communicate(timeout=240)[0]
        ends[rank] = time.monotonic()

    threads = [threading.Thread(target=wait, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outputs, ends


@pytest.mark.parametrize(("how", "victim"), [("asleep", 1), ("endless loop", 0), ("stopped", 1), ("stopped", 0)])
def test_a_rank_that_hangs_is_named_within_twice_the_timeout(run, how, victim):
    processes = start_ranks(3, hanging(run, how, victim), "--config", run)
    outputs, seconds = outputs_and_seconds(processes, how, victim)
    name = f"rank {victim} ({os.uname().nodename}, process {processes[victim].pid})"
    for rank in outputs:
        assert processes[rank].returncode == 1 and "Traceback" not in outputs[rank], outputs[rank]
        assert seconds[rank] < 2 * TIMEOUT_S
        assert name in outputs[rank] and "remedy:" in outputs[rank], outputs[rank]
        if how == "stopped":
            assert "is gone" in outputs[rank] and "is stopped (SIGSTOP or Ctrl-Z)" in outputs[rank]
        else:
            assert re.search(rf"{re.escape(name)} reads sample \d+, step 4, at \S+hanging.py", outputs[rank])
            assert "wait in the gradient all-reduce, step 4" in outputs[rank]
        stacks = stack_path(run.parent / "run", rank).read_text()
        assert "trainer.py" in stacks and ('hanging.py", line 9 in reading' in stacks) == (rank == victim)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor_size", "pipeline_size"])
@pytest.mark.parametrize(("how", "victim"), [("asleep", 0), ("endless loop", 1), ("stopped", 1)])
def test_a_hang_within_a_model_that_ranks_share_is_named_too(run, layout, how, victim):
    processes = start_ranks(2, hanging(run, how, victim), "--config", run, f"--parallel.{layout}=2")
    outputs, seconds = outputs_and_seconds(processes, how, victim)
    for rank in outputs:
        assert processes[rank].returncode == 1 and "Traceback" not in outputs[rank], outputs[rank]
        assert seconds[rank] < 2 * TIMEOUT_S
        assert f"rank {victim} (" in outputs[rank] and "remedy:" in outputs[rank], outputs[rank]
        assert stack_path(run.parent / "run", rank).stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(("how", "victim"), [("asleep", 0), ("endless loop", 1), ("stopped", 1), ("stopped", 0)])
def test_under_torchrun_as_well(run, how, victim):
    """torchrun holds the store. It kills a stopped rank 30 s after another one has failed, whatever it is told."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    hung, stops = None, []
    with subprocess.Popen(
        [*command, hanging(run, how, victim), "--config", run], env=process_environment(), **pipes
    ) as launcher:
        for line in launcher.stdout:
            if found := re.search(r"HANGS AT (\S+)", line):
                hung = float(found[1])
            if found := re.search(r"error: rank (\d) stops: (.*)", line):
                stops.append((int(found[1]), found[2], time.monotonic()))
    assert launcher.returncode == 1
    assert {rank for rank, _, _ in stops} >= {rank for rank in range(3) if rank != victim}
    for rank, why, when in stops:
        assert f"rank {victim} (" in why and when - hung < 2 * TIMEOUT_S
        assert stack_path(run.parent / "run", rank).stat().st_size


@pytest.mark.slow
def test_ranks_of_a_killed_torchrun_end_and_the_next_start_follows_at_once(run):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megachiar.pretrain", "--config", str(run), "--training.global_batch_size=4"]
    metrics = run.parent / "run" / "metrics.jsonl"
    with subprocess.Popen(command, env=process_environment(), cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        until = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size > 300):
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        first.kill()
    done = subprocess.run(
        [*command, "--training.steps=3"],
        env=process_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_stacks_are_written_on_request_and_by_a_signal(run):
    processes = started(run)
    folder = run.parent / "run"
    try:
        done = forked_python("-m", "megachiar", "stacks", folder)
        assert done.returncode == 0, done.stdout + done.stderr
        for rank, process in enumerate(processes):
            assert re.search(rf"^rank {rank} \(process {process.pid}\) \w+ .*, step \d+$", done.stdout, re.M)
        before = stack_path(folder, 1).read_text()
        processes[1].send_signal(signal.SIGUSR2)
        until = time.monotonic() + 30
        while "trainer.py" not in stack_path(folder, 1).read_text()[len(before) :]:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert all(process.poll() is None for process in processes)
        processes[2].send_signal(signal.SIGSTOP)
        done = forked_python("-m", "megachiar", "stacks", folder, "--wait", "2")
        assert done.returncode == 1 and "rank 2 has not answered" in done.stdout
    finally:
        for process in processes:
            process.kill()
            process.wait()
    done = forked_python("-m", "megachiar", "stacks", folder)
    assert done.returncode == 2 and "no run works in this folder" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [4, 60])
def test_a_suspended_run_goes_on_or_says_that_it_was_suspended_for_too_long(run, timeout):
    processes = started(run, f"--training.communication_timeout_s={timeout}")
    metrics = run.parent / "run" / "metrics.jsonl"
    try:
        for process in processes:
            process.send_signal(signal.SIGTSTP)
        until = time.monotonic() + 10
        while any(state_of(process.pid) != "T" for process in processes):
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(12)  # with a timeout of 4 s the system's timer would end a rank after 10 s, without a word
        for process in processes:
            process.send_signal(signal.SIGCONT)
        size, until = metrics.stat().st_size, time.monotonic() + 30
        while metrics.stat().st_size < size + 500 and all(process.poll() is None for process in processes):
            assert time.monotonic() < until
            time.sleep(0.05)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        if timeout > 12 or "stopped by" in outputs[0]:
            assert {process.returncode for process in processes} == {EXIT_STOPPED}, outputs
        else:  # a collective had waited for too long
            assert all("was suspended for" in " ".join(output.split()) for output in outputs), outputs
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_slow_rank_is_named_in_the_log_and_in_the_metrics(run):
    program = run.parent / "slow.py"
    program.write_text(
        "import os, time\n"
        "from megachiar.data.sampling import loader\n"
        "read = loader.BatchLoader.__next__\n"
        "def reading(self):\n"
        "    time.sleep(0.3 * (os.environ['RANK'] == '2'))\n"
        "    return read(self)\n"
        "loader.BatchLoader.__next__ = reading\n"
        "from megachiar.console import run\n"
        "from megachiar.pretrain import main\n"
        "run(main)\n"
    )
    outputs = run_ranks(3, program, "--config", run, "--training.steps=25")
    assert re.search(r"rank 2 \(.*\) is slow: 0\.\d+ s of its own a step, .* of the time is lost", outputs[0])
    records = [record for record in read_metrics(run.parent / "run", "train") if record["slowest_rank"] is not None]
    assert records and all(record["slowest_rank"] == 2 for record in records)
    assert all(0.3 < record["slowest_rank_lost_share"] < 1 for record in records)


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
