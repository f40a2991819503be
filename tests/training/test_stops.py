"""A stop saves first: an evaluation is broken off and made up for later, and a run may be given a limit of time."""

from __future__ import annotations

import itertools
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import ForkedRank, damage_of, pretrain, small_config, start_ranks, write_config, write_tokens

from megachiar.checkpoint.format import complete_checkpoints, read_state
from megachiar.config import load_config
from megachiar.config.duration import parse_duration
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.training.break_off import BreakOff, EvaluationBrokenOff
from megachiar.training.kill_limit import KillLimit
from megachiar.training.metrics import MetricsWriter, read_metrics
from megachiar.training.owed_evaluation import owed_evaluations
from megachiar.training.validation import Validation

MAIN = "from megachiar.console import run\nfrom megachiar.pretrain import main\nrun(main)\n"


@pytest.fixture
def config(tmp_path) -> Path:
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", documents=8, seed=1)
    write_tokens(tmp_path / "other", documents=2, seed=2)
    config = small_config(tmp_path, training={"steps": 3, "global_batch_size": 4, "micro_batch_size": 1})
    config["data"]["validation"]["other"] = str(tmp_path / "other")
    return write_config(tmp_path / "config.yaml", config)


def wait_for(process: ForkedRank, mark: Path) -> None:
    """Wait until a process has made the file ``mark``."""
    until = time.monotonic() + 120
    while not mark.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_an_evaluation_is_broken_off_and_made_up_for(config, name):
    """Rank 1 alone gets the signal in the middle of the last evaluation, which would take a minute."""
    run, mark = config.parent / "run", config.parent / "evaluates"
    program = config.parent / "slow.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "mark = pathlib.Path(sys.argv.pop())\n"
        "from megachiar.engine import engine\n"
        "score, count = engine.Engine.evaluate, 0\n"
        "def scoring(*arguments):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 3:\n"
        "        mark.touch()\n"
        "    time.sleep(2)\n"
        "    return score(*arguments)\n"
        "engine.Engine.evaluate = scoring\n" + MAIN
    )
    processes = start_ranks(2, program, "--config", config, mark)
    wait_for(processes[1], mark)
    processes[1].send_signal(getattr(signal, name))
    began = time.monotonic()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert time.monotonic() - began < 10
    assert [process.returncode for process in processes] == [EXIT_STOPPED] * 2, outputs
    assert "evaluation of other, valid put off" in outputs[0] and "after step 3, saved" in outputs[0]
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step_00000003"]
    assert not any(record["kind"].startswith("evaluation/") for record in read_metrics(run))
    assert owed_evaluations(run, 3) == ["other", "valid"]
    if name == "SIGTERM":
        is_made_up_for(config, run)


def is_made_up_for(config: Path, run: Path) -> None:
    """Check that the run evaluates first when it goes on, with the result of a run that nobody stopped."""
    (output,) = pretrain(config)
    assert "valid: loss" in output and "other: loss" in output and "is finished" not in output
    assert owed_evaluations(run, 3) == []
    made_up = [record for record in read_metrics(run) if record["kind"].startswith("evaluation/")]
    assert [(record["kind"], record["step"], record["complete"]) for record in made_up] == [
        ("evaluation/other", 3, True),
        ("evaluation/valid", 3, True),
    ]
    (saved,) = complete_checkpoints(run / "checkpoints")
    assert damage_of(saved) is None
    assert read_state(saved).validation == {r["kind"].removeprefix("evaluation/"): r["loss"] for r in made_up}
    pretrain(config, f"logging.folder={config.parent / 'undisturbed'}", ranks=2)
    undisturbed = read_metrics(config.parent / "undisturbed", "evaluation/other")
    assert made_up[0]["loss"] == pytest.approx(undisturbed[0]["loss"], rel=1e-6)
    (output,) = pretrain(config)
    assert "is finished" in output


def test_an_evaluation_that_is_broken_off_twice_is_left_out(tmp_path, monkeypatch):
    """One that takes longer than a job has would otherwise keep the run from ever making a step again."""
    said: list[str] = []
    writer = MetricsWriter(tmp_path, step=0, warn=said.append)
    watched = SimpleNamespace(signals=None, activity=None)
    sets = dict.fromkeys(("long", "short"))
    validation = Validation(None, sets, writer, SimpleNamespace(line=said.append), watched)

    def broken_off(*_):
        raise EvaluationBrokenOff

    monkeypatch.setattr(validation, "_evaluate", broken_off)
    assert not validation.run(list(sets), step=4)
    assert owed_evaluations(tmp_path, 4) == ["long", "short"]
    assert not validation.run(owed_evaluations(tmp_path, 4), step=4, is_owed=True)
    assert "evaluation of long after step 4 broken off again: left out" in said
    assert owed_evaluations(tmp_path, 4) == ["short"]
    assert not validation.run(owed_evaluations(tmp_path, 4), step=4, is_owed=True)
    assert owed_evaluations(tmp_path, 4) == []
    assert validation.run([], step=4, is_owed=True)
    assert validation.run([], step=4, put_off=True)


def test_a_signal_while_ranks_meet_ends_at_once(config):
    program = config.parent / "lonely.py"
    program.write_text(
        "import os, pathlib, sys, time\n"
        "mark = pathlib.Path(sys.argv.pop())\n"
        "time.sleep(600 * (os.environ['RANK'] == '1'))\n"
        "import deepspeed\n"
        "meet = deepspeed.init_distributed\n"
        "deepspeed.init_distributed = lambda *a, **n: (mark.touch(), meet(*a, **n))\n" + MAIN
    )
    mark = config.parent / "meets"
    processes = start_ranks(2, program, "--config", config, mark)
    try:
        wait_for(processes[0], mark)
        time.sleep(0.5)
        processes[0].send_signal(signal.SIGTERM)
        began = time.monotonic()
        output = processes[0].communicate(timeout=60)[0]
        assert time.monotonic() - began < 5
        assert processes[0].returncode == EXIT_STOPPED and "stopped by SIGTERM before training" in output
    finally:
        processes[1].kill()


def test_a_run_stops_after_its_time_but_makes_a_step(config):
    run = config.parent / "run"
    for step in (1, 2):
        output, _ = pretrain(config, "training.stop_after=0.01s", ranks=2, codes=(EXIT_STOPPED,))
        assert f"stopped by training.stop_after after step {step}, saved" in output
        assert complete_checkpoints(run / "checkpoints")[-1].name == f"step_{step:08d}"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("11h30m", 41_400),
        ("2d", 172_800),
        ("1d12h", 129_600),
        ("90s", 90),
        ("1.5h", 5_400),
        ("45 m", 2_700),
        ("3600", 3_600),
        (7, 7),
        (None, None),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "-5", "0s", "0", "5x", "30m11h", "h", "1h1h", "[1]", "true"])
def test_what_is_no_duration_is_refused(config, text):
    with pytest.raises(UserError, match=r"training\.stop_after: is .*must be a"):
        load_config(config, [f"training.stop_after={text}"])


def test_ranks_break_off_at_the_same_batch(monkeypatch):
    """Three ranks of different speed ask in step with each other, about every second, and stop together."""
    now = [0.0, 0.0, 0.0]
    current = 0
    monkeypatch.setattr(time, "monotonic", lambda: now[current])
    asked: list[list[float]] = []
    answers: list[list[float]] = []
    stops = [False, False, False]

    def reduce_sum(values: list[float]) -> list[float]:
        asked.append(values)
        return answers.pop(0)

    ranks = [BreakOff(lambda rank=rank: stops[rank], reduce_sum) for rank in range(3)]
    rounds = []
    for batch in range(400):
        stops[1] = batch > 300
        found = []
        asks = [rank._left == 1 for rank in ranks]
        assert len(set(asks)) == 1
        if asks[0]:
            taken = [
                0.0 if rank._asked is None else (now[i] - rank._asked) / rank._batches for i, rank in enumerate(ranks)
            ]
            answers = [[float(any(stops)), sum(taken), 3.0]] * 3
            rounds.append(max(now))
        for current, rank in enumerate(ranks):
            found.append(rank.asked())
            now[current] += (0.01, 0.02, 0.03)[current]
        assert len(set(found)) == 1
        if found[0]:
            break
    assert 300 < batch < 300 + 1.0 / 0.02 * 2
    gaps = [after - before for before, after in itertools.pairwise(rounds[6:])]
    assert all(0.5 < gap < 2.5 for gap in gaps)


def test_a_save_that_takes_longer_than_the_launcher_waits_is_said_once(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert KillLimit().line(1000) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    limit = KillLimit()
    assert limit.line(29) is None
    assert "torchrun kills ranks 30 s after a signal" in (limit.line(31) or "")
    assert limit.line(31) is None
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    assert KillLimit().line(31) is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("CROSS_RANK", "0")
    assert "deepspeed kills ranks 30 s" in (KillLimit().line(31) or "")
