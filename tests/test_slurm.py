"""The Slurm scripts, with srun, sbatch and scontrol played by stubs that write down how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, process_environment

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
STUBS = {
    # Runs the task once, as rank 0 would be.
    "srun": 'echo "srun $*" >>"$CALLS"; echo "rendezvous $MASTER_ADDR $MASTER_PORT" >>"$CALLS"\n'
    'while [ "$1" != bash ]; do shift; done\nexec "$@"\n',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\nif [ "$1" = show ]; then printf "nodea\\nnodeb\\n"; fi\n',
    "sbatch": 'echo "sbatch $*" >>"$CALLS"\necho 77\n',
    "python": 'echo "python $*" >>"$CALLS"\n[ -z "$PROGRAM" ] || exec bash -c "$PROGRAM"\n',
}


class Cluster:
    """A checkout, a PATH of stubs, and what they were called with."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        for name in ("slurm", "megachiar", "tools"):
            (folder / name).symlink_to(ROOT / name)
        stubs = folder / "venv" / "bin"
        stubs.mkdir(parents=True)
        for name, body in STUBS.items():
            (stubs / name).write_text("#!/bin/bash\n" + body)
            (stubs / name).chmod(0o755)
        (stubs / "activate").write_text("")
        self.env = process_environment(
            PATH=f"{stubs}:{os.environ['PATH']}",
            CALLS=str(self.calls),
            PROGRAM="",
            VENV=str(folder / "venv"),
            SLURM_SUBMIT_DIR=str(folder),
            SLURM_JOB_ID="4242",
            SLURM_JOB_NODELIST="node[a-b]",
            SLURM_NTASKS="4",
            SLURM_CPUS_PER_TASK="3",
        )

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        # As sbatch does it: a copy of the script, somewhere else.
        spool = self.folder / "spool"
        spool.mkdir(exist_ok=True)
        copy = spool / "slurm_script"
        copy.write_text((ROOT / "slurm" / script).read_text())
        return subprocess.Popen(
            ["bash", str(copy), *arguments],
            cwd=spool,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **env: str) -> tuple[int, str, str]:
        """Exit code, what was printed, what the stubs were called with."""
        process = self.start(script, *arguments, **env)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output, self.calls.read_text() if self.calls.exists() else ""


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize("name", ["400m", "400m_baseline"])
def test_a_job_starts_every_rank_with_its_arguments(cluster, name):
    code, output, calls = cluster.run(f"pretrain_{name}.sh", "--set", "training.steps=10", "logging.folder=my runs")
    assert code == 0 and "finished" in output, output
    assert "srun --cpus-per-task=3 --kill-on-bad-exit=1 bash slurm/task.sh python -u -m megachiar.pretrain" in calls
    assert (
        f"python -u -m megachiar.pretrain --config configs/{name}.yaml --set training.steps=10 logging.folder=my runs"
        in calls
    )
    assert f"rendezvous nodea {20000 + 4242}" in calls
    assert "requeue" not in calls


@pytest.mark.parametrize(
    ("exit_code", "restarts", "requeued"),
    [
        (0, 0, False),
        (2, 0, False),
        (75, 0, True),
        (75, 99, True),
        (1, 0, True),
        (1, 4, True),
        (1, 5, False),
        (137, 5, False),
    ],
)
def test_what_is_requeued(cluster, exit_code, restarts, requeued):
    code, output, calls = cluster.run(
        "pretrain_400m.sh", PROGRAM=f"exit {exit_code}", SLURM_RESTART_COUNT=str(restarts)
    )
    assert code == exit_code, output
    assert ("scontrol requeue 4242" in calls) == requeued, output


def test_a_user_error_counts_even_if_other_ranks_were_killed_for_it(cluster):
    srun = cluster.folder / "venv" / "bin" / "srun"
    srun.write_text(srun.read_text().replace('exec "$@"', '"$@"; exit 137'))
    code, output, calls = cluster.run("pretrain_400m.sh", PROGRAM="exit 2")
    assert code == 2 and "requeue" not in calls, output
    assert not list(cluster.folder.glob(".slurm-user-error*"))


def test_the_signal_reaches_the_ranks_and_the_job_is_requeued(cluster):
    rank = cluster.folder / "rank.py"
    rank.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (print('saving', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\ntime.sleep(30)\n"
    )
    process = cluster.start("pretrain_400m.sh", PROGRAM=f"exec {sys.executable} {rank}")
    lines = []
    while "ready" not in "".join(lines):
        lines.append(process.stdout.readline())
    os.kill(process.pid, signal.SIGUSR1)  # the batch shell alone, as --signal=B: does
    # A real srun passes the signal on to its tasks; the stub became the task, and bash waits for its child.
    time.sleep(0.3)
    subprocess.run(["pkill", "-USR1", "-f", str(rank)], check=True)
    output = "".join(lines) + process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "saving" in output and "saved after a signal; requeued" in output
    assert "scontrol requeue 4242" in cluster.calls.read_text()


@pytest.mark.parametrize("script", ["pretrain_400m.sh", "preprocess.sh"])
def test_submitted_from_elsewhere_it_says_so(cluster, script):
    code, output, _ = cluster.run(script, SLURM_SUBMIT_DIR=str(cluster.folder / "spool"))
    assert code == 2, output
    assert "common.sh" in output


@pytest.mark.parametrize("name", ["pretrain_400m.sh", "pretrain_400m_baseline.sh"])
def test_job_scripts_ask_for_what_a_requeue_needs(name):
    text = (ROOT / "slurm" / name).read_text()
    for line in ("--signal=B:USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=8"):
        assert f"#SBATCH {line}\n" in text
    assert "--gpus-per-task" not in text.replace("#", "")


def test_preprocessing_is_an_array_and_a_merge(cluster):
    files = []
    for number in range(5):
        files.append(str(cluster.folder / f"in{number}.jsonl"))
        Path(files[-1]).write_text("{}\n")
    done = cluster.run("preprocess.sh", "submit", "out/web", "tok", "2", *files, "--", "--on-error", "skip")
    assert done[0] == 0, done[1]
    first, second = [line for line in done[2].splitlines() if line.startswith("sbatch")]
    assert "--array=0-1 slurm/preprocess.sh shard out/web tok 2" in first
    assert "--dependency=afterok:77" in second and "merge out/web 2" in second
    shard = cluster.run("preprocess.sh", *first.split("preprocess.sh ")[1].split(), SLURM_ARRAY_TASK_ID="1")
    assert shard[0] == 0, shard[1]
    call = shard[2].splitlines()[-1]
    assert f"--input {files[1]} {files[3]} --tokenizer tok" in call
    assert "--output-prefix out/web.shards/00001 --on-error skip" in call
    merge = cluster.run("preprocess.sh", "merge", "out/web", "2")
    assert merge[0] == 0, merge[1]
    assert "merge_datasets.py out/web.shards/00000 out/web.shards/00001 --output out/web" in merge[2]
    assert not (cluster.folder / "out" / "web.shards").exists()


def test_a_failed_merge_keeps_the_shards(cluster):
    (cluster.folder / "out" / "web.shards").mkdir(parents=True)
    code, _, _ = cluster.run("preprocess.sh", "merge", "out/web", "2", PROGRAM="exit 2")
    assert code == 2 and (cluster.folder / "out" / "web.shards").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "out", "tok", "two", "README.md"], "not a number"),
        (["submit", "out", "tok", "1", "nothing.jsonl"], "no such file"),
        (["submit", "out", "tok", "3", "slurm/env.sh"], "1 files for 3 shards"),
        ([], "usage:"),
    ],
)
def test_bad_calls_are_refused(cluster, arguments, message):
    code, output, calls = cluster.run("preprocess.sh", *arguments)
    assert code == 2 and message in output, output
    assert "sbatch" not in calls
