"""One run a folder: a living owner's lock is refused, a dead one's taken over, and of many starters one gets it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import pretrain, small_config, start_ranks, write_config, write_tokens

from megachiar.errors import UserError
from megachiar.process_identity import ProcessIdentity
from megachiar.training import run_lock
from megachiar.training.run_lock import Attempt, Owner, RunLock, read_locks

ELSEWHERE = ProcessIdentity("another-host", 4711, 1, "another machine")


def lock_of(folder: Path, said: list[str] | None = None) -> RunLock:
    return RunLock(folder, 4, [].append if said is None else said.append)


def leave(folder: Path, *, age: float = 0.0, number: int = 1, **fields) -> Path:
    """Leave the lock of an owner that is like this process but for ``fields``, and return its path."""
    folder.mkdir(exist_ok=True)
    path = folder / f"run-{number}.lock"
    path.write_text(dataclasses.replace(Owner.current(4), **fields).to_json())
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def sleeper():
    """A process that lives until the test ends it."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_there_as_long_as_the_run(tmp_path):
    folder = tmp_path / "runs" / "a"
    with lock_of(folder) as lock:
        (found,) = read_locks(folder)
        assert found.owner == lock.owner and found.owner.process == ProcessIdentity.of(os.getpid())
        assert lock.is_held() and os.listdir(folder) == ["run-1.lock"]
    assert not folder.exists()  # nothing else was ever in it
    folder.mkdir()
    (folder / "config.yaml").touch()
    with lock_of(folder):
        pass
    assert os.listdir(folder) == ["config.yaml"]


def test_a_living_owner_is_named(tmp_path, sleeper):
    left = leave(tmp_path, process=ProcessIdentity.of(sleeper.pid), age=10_000)  # whatever its heartbeat
    with (
        pytest.raises(UserError, match=f"another run works .* process {sleeper.pid} on .*\n.*remedy") as raised,
        lock_of(tmp_path),
    ):
        pass
    assert raised.value.where == str(tmp_path)
    os.kill(sleeper.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="another run works"), lock_of(tmp_path):
        pass
    assert os.listdir(tmp_path) == [left.name]


@pytest.mark.parametrize("reaped", [True, False])
def test_a_dead_owner_is_followed_at_once(tmp_path, sleeper, reaped):
    owner = ProcessIdentity.of(sleeper.pid)
    sleeper.kill()
    if reaped:
        sleeper.wait()
    else:
        while owner.runs():
            time.sleep(0.01)
    leave(tmp_path, process=owner)
    said: list[str] = []
    began = time.monotonic()
    with lock_of(tmp_path, said) as lock:
        assert [found.owner for found in read_locks(tmp_path)] == [lock.owner]
    assert time.monotonic() - began < 2
    assert len(said) == 1 and "took over the run folder" in said[0] and f"process {owner.pid} on" in said[0]


def test_another_process_with_the_same_id_is_not_the_owner(tmp_path, sleeper):
    process = ProcessIdentity.of(sleeper.pid)
    leave(tmp_path, process=dataclasses.replace(process, started=process.started - 1))
    with lock_of(tmp_path):
        pass


def test_on_another_machine_an_old_heartbeat_is_a_death(tmp_path):
    leave(tmp_path, process=ELSEWHERE, age=run_lock.DEAD_AFTER_S + 5)
    began = time.monotonic()
    with lock_of(tmp_path):
        assert time.monotonic() - began < 2


def test_on_another_machine_silence_is_waited_for_and_said(tmp_path):
    leave(tmp_path, process=ELSEWHERE, age=run_lock.DEAD_AFTER_S - 1.5)
    said: list[str] = []
    began = time.monotonic()
    with lock_of(tmp_path, said):
        assert time.monotonic() - began > 1
    assert "process 4711 on another-host" in said[0] and "waiting for a sign of life" in said[0]


def test_on_another_machine_a_new_heartbeat_is_a_life(tmp_path):
    left = leave(tmp_path, process=ELSEWHERE, age=run_lock.DEAD_AFTER_S - 10)
    heartbeat = threading.Timer(0.5, os.utime, [left])
    heartbeat.start()
    with pytest.raises(UserError, match=r"another run works .* process 4711 on another-host"), lock_of(tmp_path):
        pass
    heartbeat.join()


def test_the_machines_clock_does_not_matter(tmp_path, monkeypatch):
    """The file system's clock alone counts, here with a machine that is an hour late."""
    leave(tmp_path, process=ELSEWHERE, age=run_lock.DEAD_AFTER_S + 5)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    with lock_of(tmp_path):
        pass


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    with lock_of(tmp_path) as lock:
        os.utime(lock.path, (0, 0))
        until = time.monotonic() + 10
        while read_locks(tmp_path)[0].heartbeat == 0:
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}),
        (
            {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"},
            {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2"},
        ),
    ],
)
def test_a_later_start_of_the_same_job_waits_for_nothing(tmp_path, monkeypatch, before, now):
    """The owner ran on another machine, and its heartbeat is fresh."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    leave(tmp_path, process=ELSEWHERE)
    assert not Attempt.current().follows(Attempt.current())
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with lock_of(tmp_path):
        assert time.monotonic() - began < 2


def test_an_owner_without_a_launcher_is_waited_for(tmp_path, sleeper):
    gone = ProcessIdentity.of(os.getpid())
    leave(tmp_path, process=ProcessIdentity.of(sleeper.pid), launcher=(dataclasses.replace(gone, started=0),))
    end = threading.Timer(0.5, sleeper.kill)
    end.start()
    with lock_of(tmp_path) as lock:
        assert lock.is_held()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"process": 3}', '{"process": {"pid": 1}, "launcher": []}'])
def test_a_lock_that_cannot_be_read_counts_by_its_heartbeat(tmp_path, text):
    path = tmp_path / "run-1.lock"
    path.write_text(text)
    os.utime(path, (time.time() - run_lock.DEAD_AFTER_S - 5,) * 2)
    with lock_of(tmp_path) as lock:
        assert lock.is_held() and not path.exists()


def test_an_owner_that_was_taken_for_dead_replaces_nothing(tmp_path):
    with lock_of(tmp_path) as lock:
        lock.confirm()
        lock.path.rename(tmp_path / "run-9.lock")
        with pytest.raises(UserError, match="another run has taken this run folder over"):
            lock.confirm()
    assert (tmp_path / "run-9.lock").exists()


@pytest.mark.parametrize("what", ["folder", "lock"])
def test_a_folder_that_was_moved_or_emptied_is_not_said_to_be_another_runs(tmp_path, what):
    with lock_of(tmp_path / "run") as lock:
        lock.path.unlink() if what == "lock" else lock.folder.rename(tmp_path / "moved")
        with pytest.raises(UserError, match=r"run-1\.lock is gone: the folder was moved or emptied"):
            lock.confirm()


def test_a_starter_that_was_held_up_withdraws(tmp_path, monkeypatch):
    """Between its look at the folder and its own lock, another one takes a later number and removes the first lock."""
    first = leave(tmp_path, process=dataclasses.replace(ProcessIdentity.of(os.getpid()), started=0))
    link = run_lock._link

    def held_up(source: Path, path: Path) -> bool:
        monkeypatch.setattr(run_lock, "_link", link)
        leave(tmp_path, number=3)
        first.unlink()
        return link(source, path)

    monkeypatch.setattr(run_lock, "_link", held_up)
    with pytest.raises(UserError, match="another run works"), lock_of(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["run-3.lock"]


def test_without_hard_links_it_works_as_well(tmp_path, monkeypatch, sleeper):
    def refuse(*_args, **_named):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    with lock_of(tmp_path), pytest.raises(UserError, match="another run works"), lock_of(tmp_path):
        pass


def take_turns(folder: Path, inside: Path, rounds: int, seed: int) -> None:
    """Take the lock so many times, and find the mark of another holder there never; some holders die with the lock."""
    draw = random.Random(seed)
    done = 0
    while done < rounds:
        try:
            with lock_of(folder):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # raises if another one holds the lock too
                time.sleep(draw.random() * 0.002)
                inside.unlink()
                done += 1
                if done == rounds and seed % 3 == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        except UserError:
            time.sleep(draw.random() * 0.002)


def test_of_many_starters_one_at_a_time_gets_the_lock(tmp_path):
    folder, inside, rounds = tmp_path / "run", tmp_path / "inside", 25
    leave(folder, process=dataclasses.replace(ProcessIdentity.of(os.getpid()), started=0))
    context = multiprocessing.get_context("fork")
    starters = [context.Process(target=take_turns, args=(folder, inside, rounds, seed)) for seed in range(9)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(120)
    assert [starter.exitcode for starter in starters] == [-9, 0, 0] * 3
    assert not inside.exists()


def test_a_second_run_is_refused_and_a_killed_one_is_followed(tmp_path):
    write_tokens(tmp_path / "train")
    config = small_config(tmp_path, training={"steps": 100_000}, checkpoint={"every": 5})
    del config["data"]["validation"]
    path = write_config(tmp_path / "config.yaml", config)
    (first,) = start_ranks(1, "-m", "megachiar.pretrain", "--config", path)
    checkpoints = tmp_path / "run" / "checkpoints"
    until = time.monotonic() + 120
    while not list(checkpoints.glob("step_????????")):
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    (output,) = pretrain(path, codes=(2,))
    assert f"another run works in this run folder: process {first.pid} on" in output and "Traceback" not in output
    first.kill()
    first.wait()
    step = max(int(found.name[5:]) for found in checkpoints.glob("step_????????"))
    (output,) = pretrain(path, f"training.steps={step + 3}")
    assert "took over the run folder" in output and "resumed from" in output
    assert not list((tmp_path / "run").glob("*.lock"))
