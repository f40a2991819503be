"""Runs that are killed again and again, at random moments, end as if nothing had happened.

``pytest -m slow tests/checkpoint/test_soak.py`` kills 50 times, or as often as ``--soak-kills`` says. Each test prints
the seed of its moments and victims; ``--soak-seed`` repeats them, as far as a machine repeats its timing.
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from support import (
    ROOT,
    checkpoint_tensors,
    pretrain,
    process_environment,
    small_config,
    start_ranks,
    write_config,
    write_tokens,
)

from megachiar.checkpoint.format import checkpoint_name, complete_checkpoints, find_damage
from megachiar.training.metrics import read_metrics

RANKS, SAVED_EVERY = 4, 2
ALONE_S = 120  # for ranks to notice that they have lost another one, or their launcher
LAYOUTS: dict[str, dict] = {
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 3": {"zero_stage": 3},
    "tp 2, dp 2": {"zero_stage": 1, "tensor_size": 2},
    "pp 2, dp 2": {"zero_stage": 1, "pipeline_size": 2},
}
VICTIMS = ("one rank", "all ranks", "the launcher")
MOMENTS = ("while it starts", "after a step", "while it saves")


@dataclass
class Report:
    """What a soak did.

    Attributes:
        kills: by victim.
        moments: the same kills by what the run did then.
        restarts: starts of a run that had begun before.
        lost: logged steps that a kill undid, so that they had to be taken again.
        runs: runs that reached their last step.
    """

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    lost: int = 0
    runs: int = 0

    def __str__(self) -> str:
        def counts(of: Counter[str]) -> str:
            return ", ".join(f"{count} {name}" for name, count in sorted(of.items()))

        return (
            f"{self.kills.total()} kills ({counts(self.kills)}; {counts(self.moments)}), {self.restarts} restarts, "
            f"{self.lost} steps lost, {self.runs} runs finished, --soak-seed {self.seed}"
        )


class Attempt:
    """One start of the run: four ranks, forked, or started by torchrun."""

    def __init__(self, config: Path, by_torchrun: bool):
        self.torchrun: subprocess.Popen[bytes] | None = None
        self.log = config.with_name("torchrun.log")
        if by_torchrun:
            command = [Path(sys.executable).with_name("torchrun"), "--standalone", f"--nproc-per-node={RANKS}"]
            with self.log.open("wb") as log:
                self.torchrun = subprocess.Popen(
                    [*command, "-m", "megachiar.pretrain", "--config", config],
                    cwd=ROOT,
                    env=process_environment(),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        else:
            self.ranks = start_ranks(RANKS, "-m", "megachiar.pretrain", "--config", config)

    def kill(self, rng: random.Random, victim: str) -> None:
        """Kill the victim, then see to it that every other rank ends by itself."""
        if self.torchrun is not None:
            ranks = psutil.Process(self.torchrun.pid).children(recursive=True)
            self.torchrun.kill()
            self.torchrun.wait()
            left = psutil.wait_procs(ranks, ALONE_S)[1]
            for process in left:
                process.kill()
            assert not left, f"ranks outlive their launcher by {ALONE_S} s\n{self.log.read_text()}"
            return
        killed = self.ranks if victim == "all ranks" else [rng.choice(self.ranks)]
        for process in killed:
            process.kill()
        codes, outputs = self._end()
        expected = [-signal.SIGKILL if process in killed else 1 for process in self.ranks]
        assert codes == expected, "\n".join(f"== exit code {c}\n{o}" for c, o in zip(codes, outputs, strict=True))

    def over(self) -> bool:
        if self.torchrun is not None:
            return self.torchrun.poll() is not None
        return any(process.poll() is not None for process in self.ranks)

    def finish(self) -> None:
        """Wait until the run is finished."""
        if self.torchrun is not None:
            assert self.torchrun.wait(ALONE_S) == 0, self.log.read_text()
        else:
            codes, outputs = self._end()
            assert codes == [0] * RANKS, outputs

    def close(self) -> None:
        """End what a failed test has left running."""
        if self.torchrun is None:
            for process in self.ranks:
                process.kill()
        elif self.torchrun.poll() is None:
            for process in [*psutil.Process(self.torchrun.pid).children(recursive=True), self.torchrun]:
                process.kill()
            self.torchrun.wait()

    def _end(self) -> tuple[list[int], list[str]]:
        outputs = [process.communicate(timeout=ALONE_S)[0] for process in self.ranks]
        return [process.returncode for process in self.ranks], outputs


class Soak:
    """A run that is killed, started again, and when it is finished compared and replaced by a new one."""

    def __init__(self, folder: Path, layout: str, steps: int, seed: int):
        self.folder, self.steps, self.rng, self.report = folder, steps, random.Random(seed), Report(seed)
        write_tokens(folder / "train")
        config = small_config(folder, parallel=LAYOUTS[layout], checkpoint={"every": SAVED_EVERY, "keep": 3})
        del config["data"]["validation"]
        config["model"]["dropout"] = 0.1
        config["training"] |= {"steps": steps, "micro_batch_size": 1, "communication_timeout_s": 60}
        self.config, self.run = write_config(folder / "config.yaml", config), folder / "run"
        pretrain(self.config, f"logging.folder={folder / 'undisturbed'}", ranks=RANKS)

    def cases(self, count: int) -> list[tuple[str, str]]:
        """Return so many victims with moments, in random order, each about as often as the others."""
        # Ranks that have not met yet wait for a killed one until the timeout: that is for a test of its own.
        cases = [case for case in itertools.product(VICTIMS, MOMENTS) if case != ("one rank", "while it starts")]
        rounds = [self.rng.sample(cases, len(cases)) for _ in range(0, count, len(cases))]
        return list(itertools.chain(*rounds))[:count]

    def kill(self, victim: str, moment: str) -> None:
        """Start the run, or go on with it, and kill the victim at that moment; it may have to finish first."""
        while True:
            attempt = self._start(victim)
            try:
                arrived = self._wait_for(attempt, moment)
                if arrived:
                    attempt.kill(self.rng, victim)
                else:
                    attempt.finish()
            finally:
                attempt.close()
            if arrived:
                return self._count(victim, moment)
            self._compare()

    def finish(self) -> None:
        """Let the run go on undisturbed to its end, and compare it."""
        attempt = self._start("one rank")
        try:
            attempt.finish()
        finally:
            attempt.close()
        self._compare()

    def _start(self, victim: str) -> Attempt:
        self.report.restarts += self.run.exists()
        return Attempt(self.config, by_torchrun=victim == "the launcher")

    def _wait_for(self, attempt: Attempt, moment: str) -> bool:
        """Wait for a moment of this kind; return False if the run has ended before."""
        if moment == "while it starts":
            time.sleep(self.rng.uniform(0, 3))
            return not attempt.over()
        # Not before the first save is whole: a run that starts anew has resumed nothing.
        step = max(SAVED_EVERY + 1, self._step() + self.rng.randint(1, self.steps // 5))
        if step > self.steps - 4 or not self._wait_until(attempt, lambda: self._step() >= step):
            return False
        if moment == "while it saves" and not self._wait_until(attempt, lambda: bool(self._incomplete())):
            return False
        time.sleep(self.rng.uniform(0, 0.05))
        return not attempt.over()

    def _wait_until(self, attempt: Attempt, condition: Callable[[], bool]) -> bool:
        while not condition():
            if attempt.over():
                return False
            time.sleep(0.003)
        return True

    def _step(self) -> int:
        """Return the step of the last whole line of the metrics, which have one a step."""
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _incomplete(self) -> list[Path]:
        return list((self.run / "checkpoints").glob("*.incomplete"))

    def _count(self, victim: str, moment: str) -> None:
        """Count a kill, and see to it that nothing it left behind only looks complete."""
        for path in (self.run / "checkpoints").glob("step_*"):
            assert path.name.endswith(".incomplete") or find_damage(path) is None
        complete = complete_checkpoints(self.run / "checkpoints")
        saved = int(complete[-1].name.removeprefix("step_")) if complete else 0
        assert saved or moment == "while it starts"
        self.report.kills[victim] += 1
        if moment != "while it starts":
            moment = MOMENTS[2] if self._incomplete() else MOMENTS[1]
            self.report.lost += self._step() - saved
        self.report.moments[moment] += 1

    def _compare(self) -> None:
        """Compare the finished run with the undisturbed one, bit for bit, and remove it."""
        undisturbed, last = self.folder / "undisturbed", Path("checkpoints") / checkpoint_name(self.steps)
        keys = ("step", "loss", "gradient_norm", "learning_rate", "attention_share")
        expected, found = (
            [[record[key] for key in keys] for record in read_metrics(folder, "train")]
            for folder in (undisturbed, self.run)
        )
        assert found == expected and len(found) == self.steps
        assert checkpoint_tensors(self.run / last) == checkpoint_tensors(undisturbed / last)
        assert not self._incomplete()
        shutil.rmtree(self.run)
        self.report.runs += 1


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    given = request.config.getoption("--soak-seed")
    return random.SystemRandom().randrange(10**6) if given is None else given


@pytest.mark.every_python
def test_killed_at_random_moments_it_still_ends_with_the_same_weights(tmp_path, seed):
    print(f"--soak-seed {seed}")
    soak = Soak(tmp_path, "tp 2, dp 2", 12, seed)
    soak.kill("one rank", "after a step")
    soak.kill("all ranks", "while it saves")
    soak.finish()
    print(soak.report)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_kills(tmp_path, seed, layout, request, capsys):
    print(f"--soak-seed {seed}")
    number = list(LAYOUTS).index(layout)
    kills = len(range(number, request.config.getoption("--soak-kills"), len(LAYOUTS)))
    soak = Soak(tmp_path, layout, 40, seed)
    for victim, moment in soak.cases(kills):
        soak.kill(victim, moment)
    soak.finish()
    with capsys.disabled():
        print(f"\n{layout}: {soak.report}")
    assert soak.report.kills.total() == kills
