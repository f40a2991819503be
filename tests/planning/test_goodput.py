"""The goodput of a cluster that fails: a discrete simulation of failures, stragglers and saves beside the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megachiar.cli.plan import main
from megachiar.errors import UserError
from megachiar.planning.goodput import HOUR, Failures, daly_interval, goodput, plan_goodput, young_interval

LLAMA_3 = 54 * 24 * HOUR * 16384 / 419
"""A GPU's mean time between failures in the training of Llama 3: 419 unexpected interruptions in 54 days on 16,384
GPUs (arXiv:2407.21783, section 3.3.4)."""

STEPS = 20
"""Steps between two saves in the simulation."""


def simulate(failures: Failures, gpus: int, interval: float, *, slow: float, seed: int) -> float:
    """Run a cluster step by step through many failures and return the share of its time that became progress.

    An interval has ``STEPS`` steps. A step lasts as long as its slowest rank takes, which is twice as long in a share
    ``slow`` of the steps. A failure may come at any time, in saves and starts too.
    """
    rng = np.random.default_rng(seed)
    mtbf = failures.cluster_mtbf(gpus)
    step = interval / STEPS
    clock, end = 0.0, min(600 * mtbf, 20_000 * interval)  # where failures are rare, fewer of them are enough
    next_failure = rng.exponential(mtbf)
    done = durable = 0
    pending: tuple[float, int] | None = None  # a checkpoint that is being written: when it is whole, and its step
    kept = 0

    def passes(seconds: float) -> bool:
        """Let so much time pass; return False where a failure comes first."""
        nonlocal clock, next_failure
        if clock + seconds > next_failure:
            clock = next_failure
            next_failure = clock + rng.exponential(mtbf)
            return False
        clock += seconds
        return True

    while clock < end:
        slowed = rng.random() < slow
        alive = passes(step * (2 if slowed else 1))
        if alive:
            done += 1
            if done % STEPS == 0 and done > kept:
                alive = passes(failures.save)
                if alive:
                    pending, kept = (clock + failures.write, done), done
        if pending is not None and pending[0] <= clock:
            durable, pending = pending[1], None
        if not alive:
            pending = None
            while not passes(failures.start):
                pass
            done = kept = durable
    return durable * step / clock


CASES = {
    "64 GPUs": (64, Failures(LLAMA_3, save=60.0, start=600.0)),
    "1,024 GPUs": (1024, Failures(LLAMA_3, save=60.0, start=600.0)),
    "16,384 GPUs": (16384, Failures(LLAMA_3, save=20.0, start=300.0)),
    "16,384 GPUs, written behind": (16384, Failures(LLAMA_3, save=5.0, start=300.0, write=60.0)),
    "failures in most starts": (16384, Failures(LLAMA_3 / 20, save=10.0, start=300.0)),
}


@pytest.mark.parametrize("slow", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_the_formula_agrees_with_the_simulation(case, slow):
    gpus, failures = CASES[case]
    failures = Failures(
        gpu_mtbf=failures.gpu_mtbf,
        save=failures.save,
        start=failures.start,
        write=failures.write,
        straggler_loss=slow / (1 + slow),
    )
    plan = plan_goodput(failures, gpus)
    steps = plan.interval * (1 - failures.straggler_loss)  # what its steps take without stragglers
    found = simulate(failures, gpus, steps, slow=slow, seed=1)
    assert 1 - found == pytest.approx(1 - plan.goodput, rel=0.1)  # what is lost


@pytest.mark.parametrize("case", ["1,024 GPUs", "16,384 GPUs", "failures in most starts"])
def test_no_other_interval_is_better(case):
    gpus, failures = CASES[case]
    best = plan_goodput(failures, gpus)
    around = [goodput(failures, gpus, best.interval * factor) for factor in np.geomspace(0.2, 5, 201)]
    assert best.goodput >= max(around) * 0.999
    found = {factor: simulate(failures, gpus, best.interval * factor, slow=0.0, seed=2) for factor in (0.25, 1.0, 4.0)}
    assert found[1.0] > max(found[0.25], found[4.0])


def test_daly_comes_to_young_where_saves_are_short():
    assert young_interval(60.0, 86400.0) == math.sqrt(2 * 60 * 86400)
    assert daly_interval(1e-3, 86400.0) == pytest.approx(young_interval(1e-3, 86400.0), rel=1e-3)
    assert daly_interval(60.0, 3600.0) < young_interval(60.0, 3600.0)
    assert daly_interval(100.0, 40.0) == 40.0


def test_a_cluster_that_never_gets_through_has_no_goodput():
    assert plan_goodput(Failures(HOUR, save=600.0, start=1e6), 10_000).goodput == 0.0


def test_the_command_prints_each_size(capsys):
    size = ["--gpus", "8", "--memory-gib", "80", "--config", "configs/tiny.yaml"]
    given = ["--mtbf-hours", "50000", "--save-seconds", "20", "--start-seconds", "300"]
    assert main([*size, *given]) == 0
    printed = capsys.readouterr().out
    plan = plan_goodput(Failures(50_000 * HOUR, save=20.0, start=300.0), 16384)
    line = next(line for line in printed.splitlines() if "16,384" in line)
    assert f"{plan.goodput:.1%}" in line and f"{plan.lost_hours_a_week:.1f} h" in line
    assert all(f"{gpus:,}" in printed for gpus in (8, 64, 1024, 16384))
    assert "checkpoint.every" in printed


@pytest.mark.parametrize("option", ["--gpus", "--memory-gib", "--tflops", "--mtbf-hours", "--save-seconds"])
def test_a_number_that_would_overflow_is_one_message(option):
    values = {"--gpus": "8", "--memory-gib": "80", "--mtbf-hours": "5e4", "--save-seconds": "9", "--start-seconds": "3"}
    values[option] = "1" + "0" * 50
    options = [text for pair in values.items() for text in pair]
    with pytest.raises(UserError, match=r"is not (at least 1|above 0) and at most 1") as caught:
        main(["--config", "configs/tiny.yaml", *options])
    assert option in str(caught.value)


@pytest.mark.parametrize("missing", ["--mtbf-hours", "--save-seconds", "--start-seconds"])
def test_failures_are_given_whole(missing):
    given = {"--mtbf-hours": "50000", "--save-seconds": "20", "--start-seconds": "300"}
    options = [text for name, value in given.items() if name != missing for text in (name, value)]
    with pytest.raises(UserError, match=missing):
        main(["--gpus", "8", "--memory-gib", "80", "--config", "configs/tiny.yaml", *options])
