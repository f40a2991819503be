"""The Slurm scripts under a real Slurm: two emulated nodes with two ranks each.

``make test-slurm`` runs these tests. They say what is missing where no Slurm can be started.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from slurm_cluster import SlurmCluster, why_no_cluster
from support import ROOT, checkpoint_tensors, process_environment, small_config, write_tokens
from text_helpers import DOCUMENTS, numbered_documents, run_tool, train, write_jsonl

from megachiar.checkpoint.format import checkpoint_name, complete_checkpoints
from megachiar.training.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS, SAVED_EVERY, DISTURBED_AT = 120, 5, 12
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    if (reason := why_no_cluster()) is not None:
        pytest.skip(reason)
    with SlurmCluster(nodes=2) as cluster:
        yield cluster


class Checkout:
    """A checkout with datasets, from which jobs are submitted to ``slurm``; its jobs train in one run folder."""

    def __init__(self, slurm: SlurmCluster, folder: Path):
        self.slurm, self.folder, self.run = slurm, folder, folder / "runs" / "tiny"
        for name in ("configs", "megachiar", "slurm", "tools"):
            (folder / name).symlink_to(ROOT / name)
        programs = folder / "venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "activate").write_text(f"PATH={shlex.quote(str(programs))}:$PATH\n")
        (programs / "python").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
        (programs / "python").chmod(0o755)
        write_tokens(folder / "train")
        write_tokens(folder / "valid", seed=1, documents=4)

    def call(self, *command: str | Path, **env: str) -> str:
        settings = {"VENV": "venv", "DATA_FOLDER": "", "RUNS_FOLDER": "", "MAX_RESTARTS": "3"}
        return self.slurm.call(*command, folder=self.folder, env=process_environment(**settings, **env))

    def submit(self, *overrides: str, options: tuple[str, ...] = ()) -> int:
        """Submit the script of the 400M model with overrides that make it train a tiny one, and return the job."""
        size = ("--nodes=2", "--ntasks-per-node=2", "--gres=none", "--cpus-per-task=1", "--time=30")
        script = ("slurm/pretrain_400m.sh", "--set", *self._tiny(), *overrides)
        return int(self.call("sbatch", "--parsable", *size, *options, *script))

    def _tiny(self) -> list[str]:
        config = small_config(self.folder, logging={"folder": str(self.run)}, checkpoint={"every": SAVED_EVERY})
        config["model"] |= {"num_layers": 3, "dropout": 0.1}
        config["training"] |= {"steps": STEPS, "epochs": None, "evaluate_every": None, "micro_batch_size": 1}
        config["data"] |= {"sequence_length": 32}
        config["precision"] = {"compute": "fp32"}
        return [
            f"{section}.{key}={json.dumps(value)}" for section, keys in config.items() for key, value in keys.items()
        ]

    def log(self, job: int) -> str:
        path = self.folder / f"slurm-megachiar-400m-{job}.out"
        return path.read_text() if path.exists() else ""

    def wait_for(self, job: int, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is in one of ``states``, or over, and return what Slurm knows of it."""

        def arrived() -> dict[str, str] | None:
            shown = self.slurm.job(job)
            return shown if shown["JobState"] in {*states, *OVER} else None

        try:
            shown = self.slurm.wait_until(arrived, seconds, f"job {job} is {' or '.join(states)}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log(job)}") from None
        assert shown["JobState"] in states, f"{shown}\n{self.log(job)}"
        return shown

    def wait_for_log(self, job: int, text: str, seconds: float = 300) -> None:
        """Wait until the log of ``job`` has ``text``, while the job is not over."""

        def said() -> bool:
            over = self.slurm.job(job)["JobState"] in OVER  # asked first: its log is whole then
            assert text in self.log(job) or not over, f"{self.slurm.job(job)}\n{self.log(job)}"
            return text in self.log(job)

        self.slurm.wait_until(said, seconds, f"'{text}' in the log of job {job}")

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes of this cluster that train, by rank."""
        found = {}
        for process in self.slurm.processes():
            try:
                if process.name().startswith("python") and "megachiar.pretrain" in process.cmdline():
                    found.setdefault(int(process.environ()["SLURM_PROCID"]), process)
            except (psutil.NoSuchProcess, KeyError):
                continue
        return found

    def last_tensors(self) -> dict[str, bytes]:
        return checkpoint_tensors(self.run / "checkpoints" / checkpoint_name(STEPS))


@pytest.fixture
def checkout(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Checkout]:
    yield Checkout(slurm, tmp_path)
    slurm.call("scancel", "--me")
    slurm.wait_until(lambda: not slurm.call("squeue", "--noheader").strip(), 60, "no job is left of the test")


@pytest.fixture(scope="module")
def undisturbed(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, int]:
    """Return a checkout whose only job ran to its end, and the number of that job."""
    checkout = Checkout(slurm, tmp_path_factory.mktemp("undisturbed"))
    job = checkout.submit()
    checkout.wait_for(job, "COMPLETED")
    return checkout, job


def test_ranks_of_two_nodes_meet_and_train_to_the_end(undisturbed):
    checkout, job = undisturbed
    log = checkout.log(job)
    assert f"job {job}: 4 ranks on n[1-2], rendezvous n1:{20000 + job}" in log
    assert "4 x CPU" in log and log.splitlines()[-1] == "finished", log
    assert [record["step"] for record in read_metrics(checkout.run, "train")] == list(range(1, STEPS + 1))
    assert checkout.slurm.job(job)["ExitCode"] == "0:0"
    assert not checkout.ranks()


def assert_ends_as(undisturbed: tuple[Checkout, int], checkout: Checkout, job: int) -> str:
    """Wait for the end of a job that was requeued, compare its run with the undisturbed one, and return its log."""
    shown = checkout.wait_for(job, "COMPLETED")
    log = checkout.log(job)
    # More than one on a busy machine: Slurm repeats signals that a node did not confirm, and may reach the next start.
    assert int(shown["Restarts"]) >= 1 and shown["ExitCode"] == "0:0", log
    assert log.splitlines()[-1] == "finished", log
    assert_same_run(undisturbed, checkout)
    return log


def assert_same_run(undisturbed: tuple[Checkout, int], checkout: Checkout) -> None:
    assert [record["step"] for record in read_metrics(checkout.run, "train")] == list(range(1, STEPS + 1))
    assert checkout.last_tensors() == undisturbed[0].last_tensors()


def test_a_signal_saves_requeues_and_changes_no_weight(undisturbed, checkout):
    job = checkout.submit()
    checkout.wait_for_log(job, f"step  {DISTURBED_AT}/{STEPS}")
    checkout.call("scancel", "--batch", "--signal=USR1", str(job))  # the signal and the way that --signal=B:USR1 takes
    log = assert_ends_as(undisturbed, checkout, job)
    assert "stopped by a signal (SIGUSR1) after step" in log and "saved after a signal; requeued" in log


def test_the_time_limit_in_an_evaluation_saves_and_requeues(undisturbed, checkout):
    write_tokens(checkout.folder / "valid", seed=1, documents=100_000)  # takes longer than the job is given
    job = checkout.submit(f"training.evaluate_every={DISTURBED_AT}", options=("--signal=B:USR1@60",))
    checkout.wait_for_log(job, f"step  {DISTURBED_AT}/{STEPS}")
    hours, minutes, _ = checkout.slurm.job(job)["RunTime"].split(":")
    # One to two minutes from now; Slurm sends the signal a minute before, or half a minute earlier.
    checkout.call("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    checkout.wait_for_log(job, "saved after a signal; requeued")
    assert re.search(rf"stopped by .* after step {DISTURBED_AT}, saved", checkout.log(job)), checkout.log(job)
    assert not read_metrics(checkout.run, "evaluation/valid"), "the evaluation has ended before"
    write_tokens(checkout.folder / "valid", seed=1, documents=4)  # and the next start has time
    checkout.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    assert_ends_as(undisturbed, checkout, job)


def test_scancel_ends_every_rank_after_a_save_and_another_job_goes_on(undisturbed, checkout):
    job = checkout.submit()
    checkout.wait_for_log(job, f"step  {DISTURBED_AT}/{STEPS}")
    checkout.call("scancel", str(job))
    shown = checkout.wait_for(job, "CANCELLED")
    checkout.slurm.wait_until(lambda: not checkout.ranks(), 30, "every rank has ended")
    assert shown["Restarts"] == "0", checkout.log(job)
    saved = complete_checkpoints(checkout.run / "checkpoints")[-1]
    last = read_metrics(checkout.run, "train")[-1]["step"]
    assert saved.name == checkpoint_name(last), f"steps after {saved.name} are lost\n{checkout.log(job)}"
    assert "ended by Slurm (cancelled, preempted or out of time)" in checkout.log(job)
    checkout.wait_for(checkout.submit(), "COMPLETED")
    assert_same_run(undisturbed, checkout)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank_is_named_and_the_job_requeued(undisturbed, checkout, rank):
    job = checkout.submit()
    checkout.wait_for_log(job, f"step  {DISTURBED_AT}/{STEPS}")
    checkout.ranks()[rank].kill()
    log = assert_ends_as(undisturbed, checkout, job)
    assert re.search(rf"rank {rank} \(n{1 + rank // 2}, process \d+\) is gone", " ".join(log.split())), log
    assert re.search(r"a rank ended with exit code \d+, crash 1 of at most 3; requeued", log), log


@pytest.mark.parametrize("node", ["n1", "n2"], ids=["the first node", "another node"])
def test_after_a_lost_node_the_job_goes_on_when_the_node_is_back(undisturbed, checkout, node):
    job = checkout.submit()
    checkout.wait_for_log(job, f"step  {DISTURBED_AT}/{STEPS}")
    checkout.slurm.cut_power(node)
    try:
        checkout.wait_for(job, "PENDING")
        assert len(complete_checkpoints(checkout.run / "checkpoints")) > 0
    finally:
        checkout.slurm.restore_power(node)
    assert_ends_as(undisturbed, checkout, job)


def test_a_bad_config_is_one_message_and_no_requeue(checkout):
    job = checkout.submit("model.hidden_size=33")
    shown = checkout.wait_for(job, "FAILED")
    log = checkout.log(job)
    assert shown["ExitCode"] == "2:0" and shown["Restarts"] == "0", log
    assert log.count("2 does not divide 33") == log.count("remedy:") == 1, log
    assert "Traceback" not in log
    assert "not requeued: see the error above" in log


def test_an_array_of_shards_and_its_merge_give_the_files_of_one_process(checkout, tmp_path):
    model = train(tmp_path, "huggingface")
    texts = [*DOCUMENTS, *numbered_documents(60)]
    files = [str(write_jsonl(tmp_path / f"{n}.jsonl", texts[n::5])) for n in range(5)]
    flags = ["--split", "train=2,valid=1"]
    call = ("bash", "slurm/preprocess.sh", "data/web", model, "3", *files, "--", *flags)
    said = checkout.call(*call, SBATCH_CPUS_PER_TASK="2")
    array, merge = map(int, re.findall(r"job (?:array )?(\d+)", said))
    checkout.wait_for(merge, "COMPLETED")
    whole = ("--output-prefix", tmp_path / "one" / "web", "--append-eod", *flags)
    done = run_tool("preprocess_data", "--input", *files, "--tokenizer", model, "--workers", 1, *whole)
    assert done.returncode == 0, done.stderr
    for name in ("web_train.bin", "web_train.idx", "web_valid.bin", "web_valid.idx"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not (tmp_path / "data" / "web.shards").exists()
    assert len(list(tmp_path.glob(f"slurm-megachiar-preprocess-{array}-*.out"))) == 3
    assert "exists already and is what this command makes" in checkout.call(*call)
    assert not checkout.call("squeue", "--noheader").strip()


def test_a_failed_shard_ends_the_merge_and_says_so(checkout, tmp_path):
    model = train(tmp_path, "huggingface")
    files = [str(write_jsonl(tmp_path / f"{n}.jsonl", numbered_documents(20))) for n in range(2)]
    Path(files[1]).write_text('{"text": broken\n')
    said = checkout.call("bash", "slurm/preprocess.sh", "data/web", model, "2", *files, SBATCH_CPUS_PER_TASK="2")
    array, merge = map(int, re.findall(r"job (?:array )?(\d+)", said))
    checkout.wait_for(merge, "CANCELLED")
    log = (tmp_path / f"slurm-megachiar-preprocess-{array}-1.out").read_text()
    assert f"{files[1]}:1" in log and "Traceback" not in log, log
    assert not (tmp_path / "data" / "web_train.bin").exists()
