"""The Slurm scripts, with srun, sbatch and scontrol played by stubs that write down how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT, process_environment, small_config, write_config, write_tokens
from text_helpers import DOCUMENTS, numbered_documents, run_tool, train, write_jsonl

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
STUBS = {
    # Runs the task once, as rank 0 would be, and passes signals on to it.
    "srun": 'echo "srun $*" >>"$CALLS"; echo "rendezvous $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS" >>"$CALLS"\n'
    'while [ "$1" != bash ]; do shift; done\nset -m; "$@" & trap "kill -USR1 -- -$!" USR1\n'
    "while :; do wait $!; code=$?; kill -0 $! 2>/dev/null || exit $code; done\n",
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\nif [ "$1" = show ]; then printf "nodea\\nnodeb\\n"; fi\n'
    'if [ "$1" = requeue ]; then exit ${REQUEUE_CODE:-0}; fi\n',
    "squeue": '[ -z "$QUEUED" ] || echo "$QUEUED"\n',
    "sbatch": 'echo "sbatch $*" >>"$CALLS"\n[ "$*" = "${*#*$REFUSED}" ] || exit 1\necho 77\n',
    "scancel": 'echo "scancel $*" >>"$CALLS"\n',
    "python": 'echo "python $*" >>"$CALLS"\n[ -z "$PROGRAM" ] || exec bash -c "$PROGRAM"\n',
}


class Cluster:
    """A checkout, a PATH of stubs, and what they were called with."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        self.crashes = folder / ".slurm-4242.crashes"
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
            QUEUED="",
            REFUSED="nothing",
            OMP_NUM_THREADS="",
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_no_line_is_longer_than_those_of_the_python_code(script):
    assert [line for line in script.read_text().splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("name", ["400m", "400m_baseline"])
def test_a_job_starts_every_rank_with_its_arguments(cluster, name):
    code, output, calls = cluster.run(f"pretrain_{name}.sh", "--set", "training.steps=10", "logging.folder=my runs")
    assert code == 0 and "finished" in output, output
    assert (
        "srun --cpus-per-task=3 --kill-on-bad-exit=1 --wait=600 bash slurm/task.sh python -u -m megachiar.pretrain"
        in calls
    )
    assert (
        f"python -u -m megachiar.pretrain --config configs/{name}.yaml --set training.steps=10 logging.folder=my runs"
        in calls
    )
    assert f"rendezvous nodea {20000 + 4242} 3" in calls
    assert "requeue" not in calls


@pytest.mark.parametrize(
    ("exit_code", "crashes", "requeued"),
    [
        (0, 0, False),
        (2, 0, False),
        (75, 0, True),
        (75, 5, True),
        (1, 0, True),
        (1, 4, True),
        (1, 5, False),
        (137, 5, False),
    ],
)
def test_what_is_requeued(cluster, exit_code, crashes, requeued):
    cluster.crashes.write_text(f"{crashes}\n")
    code, output, calls = cluster.run("pretrain_400m.sh", PROGRAM=f"exit {exit_code}", SLURM_RESTART_COUNT="9")
    assert code == exit_code, output
    assert ("scontrol requeue 4242" in calls) == requeued, output


def test_crashes_count_since_the_last_orderly_stop(cluster):
    def crash(exit_code: int, restarts: int) -> str:
        cluster.calls.unlink(missing_ok=True)
        more = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        return cluster.run("pretrain_400m.sh", PROGRAM=f"exit {exit_code}", MAX_RESTARTS="1", **more)[2]

    assert "requeue" in crash(1, 0)
    assert "requeue" in crash(75, 1), "the time limit came"
    assert "requeue" in crash(1, 2)
    assert "requeue" not in crash(1, 3)
    assert not cluster.crashes.exists()
    cluster.crashes.write_text("99\n")
    assert "requeue" in crash(1, 0), "what an older job of this number left does not count"


def test_a_requeue_that_slurm_refuses_is_said(cluster):
    code, output, _ = cluster.run("pretrain_400m.sh", PROGRAM="exit 75", REQUEUE_CODE="1")
    assert code == 75 and "did not requeue job 4242: submit it again" in output


@pytest.mark.parametrize("exit_code", [1, 75, 137])
@pytest.mark.parametrize(
    ("state", "requeued"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False), ("PENDING", False)]
)
def test_only_a_running_job_is_requeued(cluster, state, requeued, exit_code):
    # Cancelled before there was a trap for SIGTERM, or requeued by Slurm itself after a lost node.
    cluster.crashes.write_text("2\n")
    env = {"PROGRAM": f"exit {exit_code}", "QUEUED": state, "SLURM_RESTART_COUNT": "2"}
    code, output, calls = cluster.run("pretrain_400m.sh", **env)
    assert code == exit_code and ("scontrol requeue" in calls) == requeued, output
    assert ("ended by Slurm" in output) != requeued
    if exit_code == 75:
        assert not cluster.crashes.exists()
    else:
        assert cluster.crashes.read_text() == ("3\n" if requeued else "2\n"), (
            "a lost node does not start the count anew"
        )


def test_a_user_error_counts_even_if_other_ranks_were_killed_for_it(cluster):
    srun = cluster.folder / "venv" / "bin" / "srun"
    srun.write_text(srun.read_text().replace("exit $code", "exit 137"))
    code, output, calls = cluster.run("pretrain_400m.sh", PROGRAM="exit 2")
    assert code == 2 and "requeue" not in calls, output
    assert not list(cluster.folder.glob(".slurm-*"))


RANK = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: (print("saving", flush=True), time.sleep(0.5), sys.exit(int(sys.argv[1]))))
print("ready", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize(
    ("number", "exit_code", "said", "requeued"),
    [
        (signal.SIGUSR1, 75, "saved after a signal; requeued", True),
        (signal.SIGUSR1, 0, "finished", False),
        (signal.SIGTERM, 75, "ended by Slurm (cancelled, preempted or out of time)", False),
        (signal.SIGTERM, 1, "ended by Slurm (cancelled, preempted or out of time)", False),
    ],
)
def test_a_signal_reaches_the_ranks(cluster, number, exit_code, said, requeued):
    rank = cluster.folder / "rank.py"
    rank.write_text(RANK)
    process = cluster.start("pretrain_400m.sh", PROGRAM=f"exec {sys.executable} {rank} {exit_code}")
    lines = []
    while "ready" not in "".join(lines):
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    os.kill(process.pid, number)  # the batch shell alone, as --signal=B: does
    output = "".join(lines) + process.communicate(timeout=60)[0]
    assert process.returncode == exit_code, output
    assert "saving" in output and said in output, output
    assert ("scontrol requeue 4242" in cluster.calls.read_text()) == requeued


@pytest.mark.parametrize("script", ["pretrain_400m.sh", "pretrain_400m_baseline.sh", "preprocess.sh", "sweep.sh"])
def test_submitted_from_elsewhere_it_says_so(cluster, script):
    code, output, calls = cluster.run(script, SLURM_SUBMIT_DIR=str(cluster.folder / "spool"))
    assert code == 2, output
    assert f"error: {cluster.folder}/spool is not the megachiar checkout" in output
    assert calls == ""


def test_a_missing_virtual_environment_is_no_crash(cluster):
    code, output, calls = cluster.run("pretrain_400m.sh", VENV="nowhere")
    assert code == 2 and "no virtual environment in 'nowhere'" in output and "requeue" not in calls


def test_data_and_runs_may_lie_elsewhere(cluster):
    far = cluster.folder / "far"
    code, output, _ = cluster.run("pretrain_400m.sh", DATA_FOLDER=f"{far}/data", RUNS_FOLDER=f"{far}/my runs")
    assert code == 0, output
    assert (cluster.folder / "data").resolve() == far / "data"
    assert (cluster.folder / "runs").resolve() == far / "my runs"
    assert cluster.run("pretrain_400m.sh", RUNS_FOLDER=f"{far}/other")[0] == 0
    assert (cluster.folder / "runs").resolve() == far / "other"


def test_a_folder_with_something_in_it_is_not_replaced_by_a_link(cluster):
    (cluster.folder / "runs").mkdir()
    code, output, _ = cluster.run("pretrain_400m.sh", RUNS_FOLDER=str(cluster.folder / "far"))
    assert code == 2 and f"{cluster.folder}/runs is a folder, but slurm/env.sh says" in output


@pytest.mark.parametrize("name", ["400m", "400m_baseline"])
def test_job_scripts_ask_for_what_a_requeue_needs(name):
    text = (ROOT / "slurm" / f"pretrain_{name}.sh").read_text()
    for line in ("--signal=B:USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=8"):
        assert f"#SBATCH {line}\n" in text
    assert "gpus-per-task" not in text


@pytest.fixture
def inputs(cluster):
    """Five input files, one with a blank in its name, and a tokenizer."""
    (cluster.folder / "tok.json").write_text("")
    files = [str(cluster.folder / name) for name in ("a.txt", "b c.txt", "d.txt", "e.txt", "f.txt")]
    for file in files:
        Path(file).write_text("text\n")
    return files


def submitted(calls: str) -> list[list[str]]:
    """The arguments of each sbatch."""
    return [line.split()[1:] for line in calls.splitlines() if line.startswith("sbatch")]


def test_preprocessing_is_an_array_and_a_merge(cluster, inputs):
    code, output, calls = cluster.run("preprocess.sh", "out/web", "tok.json", "2", *inputs, "--", "--on-error", "skip")
    assert code == 0 and "makes 2 shards of 5 files" in output, output
    array, merge = submitted(calls)
    assert array[1:] == ["--array=0-1", "slurm/preprocess.sh", "--shard", "out/web.shards"]
    assert "--dependency=afterok:77" in merge and merge[-2:] == ["--merge", "out/web.shards"]
    whole = f"python tools/preprocess_data.py --input {' '.join(inputs)} --tokenizer tok.json --append-eod"
    whole += " --output-prefix out/web --on-error skip"
    for number in range(2):
        code, output, calls = cluster.run("preprocess.sh", *array[-2:], SLURM_ARRAY_TASK_ID=str(number))
        assert code == 0, output
        assert calls.splitlines()[-1] == f"{whole} --shard {number}/2 --workers 3"
    code, output, calls = cluster.run("preprocess.sh", *merge[-2:])
    assert code == 0, output
    assert calls.splitlines()[-1] == f"{whole} --merge-shards 2"


def test_preprocessing_goes_where_the_settings_say(cluster, inputs):
    far = str(cluster.folder / "far")
    code, output, _ = cluster.run("preprocess.sh", "data/web", "tok.json", "2", *inputs, DATA_FOLDER=far)
    assert code == 0 and (cluster.folder / "far" / "web.shards" / "plan").exists(), output
    shard = ("preprocess.sh", "--shard", "data/web.shards")
    code, output, _ = cluster.run(*shard, DATA_FOLDER=far, SLURM_ARRAY_TASK_ID="0")
    assert code == 0, output


def test_preprocessing_from_within_an_allocation_of_another_folder(cluster, inputs):
    script = str(ROOT / "slurm" / "preprocess.sh")
    call = ["bash", script, "out/web", "tok.json", "2", *inputs]
    env = {**cluster.env, "SLURM_SUBMIT_DIR": str(cluster.folder / "venv")}
    done = subprocess.run(call, cwd=cluster.folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "makes 2 shards" in done.stdout, done.stderr


def test_an_array_whose_merge_is_refused_does_not_run_alone(cluster, inputs):
    code, _, calls = cluster.run("preprocess.sh", "out/web", "tok.json", "2", *inputs, REFUSED="--merge")
    assert code == 1 and calls.splitlines()[-1] == "scancel 77"


def test_a_failed_job_fails_and_keeps_what_there_is(cluster, inputs):
    cluster.run("preprocess.sh", "out/web", "tok.json", "1", *inputs)
    shard = ("preprocess.sh", "--shard", "out/web.shards")
    assert cluster.run(*shard, SLURM_ARRAY_TASK_ID="0", PROGRAM="exit 2")[0] == 2
    code, _, _ = cluster.run("preprocess.sh", "--merge", "out/web.shards", PROGRAM="exit 2")
    assert code == 2 and (cluster.folder / "out" / "web.shards" / "plan").exists()


@pytest.mark.parametrize("split", [["--split", "train=9,valid=1"], ["--split=train=9, valid = 1"]])
def test_a_merge_that_failed_after_its_first_part_may_be_done_again(cluster, inputs, split):
    call = ("preprocess.sh", "out/web", "tok.json", "1", *inputs, "--", *split)
    cluster.run(*call)
    (cluster.folder / "out" / "web_train.bin").write_text("")
    (cluster.folder / "out" / "web.shards" / "finishing").write_text("")
    code, output, _ = cluster.run(*call)
    assert code == 0, output
    (cluster.folder / "out" / "web.shards" / "finishing").unlink()
    code, output, _ = cluster.run(*call)
    assert code == 2 and "out/web_train.bin exists already" in output, "it is another one"


@pytest.mark.parametrize("job", ["--shard", "--merge"])
def test_without_the_plan_nothing_is_done(cluster, inputs, job):
    cluster.run("preprocess.sh", "out/web", "tok.json", "1", *inputs)
    shards = cluster.folder / "out" / "web.shards"
    (shards / "00000.bin").write_text("hours of work")
    (shards / "plan").unlink()
    code, output, calls = cluster.run("preprocess.sh", job, "out/web.shards", SLURM_ARRAY_TASK_ID="0")
    assert code == 1 and "out/web.shards/plan: No such file" in output
    assert (shards / "00000.bin").exists() and "python" not in calls


def test_shards_and_merge_give_the_files_of_one_process(cluster, tmp_path):
    model = train(tmp_path, "huggingface")
    texts = [*DOCUMENTS, *numbered_documents(60)]
    files = [str(write_jsonl(tmp_path / f"{n}.jsonl", texts[n::5])) for n in range(5)]
    flags = ["--split", "train=2, valid=1", "--txt-documents", "line"]
    (cluster.folder / "venv" / "bin" / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    code, output, _ = cluster.run("preprocess.sh", "out/web", str(model), "3", *files, "--", *flags)
    assert code == 0, output
    for number in range(3):
        code, output, _ = cluster.run("preprocess.sh", "--shard", "out/web.shards", SLURM_ARRAY_TASK_ID=str(number))
        assert code == 0, output
    code, output, _ = cluster.run("preprocess.sh", "--merge", "out/web.shards")
    assert code == 0, output
    whole = ("--output-prefix", tmp_path / "one" / "web", "--append-eod", *flags)
    done = run_tool("preprocess_data", "--input", *files, "--tokenizer", model, "--workers", 1, *whole)
    assert done.returncode == 0, done.stderr
    for name in ("web_train.bin", "web_train.idx", "web_valid.bin", "web_valid.idx"):
        assert not (cluster.folder / "out" / "web.shards").exists()
        assert (cluster.folder / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    before = submitted(cluster.calls.read_text())
    code, output, calls = cluster.run("preprocess.sh", "out/web", str(model), "3", *files, "--", *flags)
    assert code == 0 and "exists already and is what this command makes" in output, output
    code, output, calls = cluster.run("preprocess.sh", "out/web", str(model), "3", *files[1:], "--", *flags)
    assert code == 2 and "exists already, and not as this command makes it: it was made with inputs" in output, output
    assert submitted(calls) == before


def test_the_same_call_goes_on_and_another_is_refused(cluster, inputs):
    call = ("preprocess.sh", "out/web", "tok.json", "2", *inputs)
    assert cluster.run(*call)[0] == 0
    assert cluster.run(*call)[0] == 0
    code, output, calls = cluster.run("preprocess.sh", "out/web", "tok.json", "3", *inputs)
    assert code == 2 and "holds shards of another call" in output, output
    assert len(submitted(calls)) == 4
    code, output, calls = cluster.run(*call, QUEUED="77 PENDING")
    assert code == 2 and "jobs 77,77 still work on out/web" in output
    assert len(submitted(calls)) == 4


def test_a_dataset_that_exists_is_kept_unless_told(cluster, inputs):
    (cluster.folder / "out").mkdir()
    for name in ("web.json", "web.idx"):  # looked for in the other order
        (cluster.folder / "out" / name).write_text("")
        code, output, _ = cluster.run("preprocess.sh", "out/web", "tok.json", "2", *inputs)
        assert code == 2 and f"out/{name} exists already" in output
    (cluster.folder / "out" / "web.bin").write_text("")
    code, output, calls = cluster.run("preprocess.sh", "out/web", "tok.json", "2", *inputs, PROGRAM="exit 2")
    assert code == 2 and "--merge-shards 2" in calls, "the tool tells whether it is the same dataset"
    assert "sbatch" not in calls
    assert cluster.run("preprocess.sh", "out/web", "tok.json", "2", *inputs, "--", "--overwrite")[0] == 0


def test_the_tokenizer_is_never_an_output(cluster, inputs):
    code, output, _ = cluster.run("preprocess.sh", "tok", "tok.json", "2", *inputs, "--", "--overwrite")
    assert code == 2 and "tok.json is the tokenizer" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "tools", "two", "slurm/env.sh"], "not a number"),
        (["out", "tools", "0", "slurm/env.sh"], "not a number"),
        (["out", "tools", "1", "nothing.jsonl"], "no such file"),
        (["out", "tools", "3", "slurm/env.sh"], "1 files for 3 shards"),
        (["out", "none.json", "1", "slurm/env.sh"], "none.json: no such tokenizer"),
        (["out", "tools", "1"], "usage:"),
        ([], "usage:"),
    ],
)
def test_bad_calls_are_refused(cluster, arguments, message):
    code, output, calls = cluster.run("preprocess.sh", *arguments)
    assert code == 2 and message in output, output
    assert "sbatch" not in calls


SWEEP_PYTHON = """#!/bin/bash
echo "python $*" >>"$CALLS"
case "$*" in *--cell*) [ -z "$REFUSAL" ] || exit 2; echo "$CONFIG" ;; esac
"""


@pytest.fixture
def cells(cluster) -> str:
    """A list of two cells, and a Python that names the config of a cell."""
    (cluster.folder / "venv" / "bin" / "python").write_text(SWEEP_PYTHON)
    cluster.env["REFUSAL"] = ""
    (cluster.folder / "cells").write_text("baseline/seed_1\nthreshold/seed_1\n")
    return "cells"


def test_a_task_of_a_sweep_trains_the_cell_of_its_number(cluster, cells):
    code, output, calls = cluster.run("sweep.sh", "mine.yaml", cells, SLURM_ARRAY_TASK_ID="1", CONFIG="out/my 1.yaml")
    assert code == 0 and "finished" in output, output
    assert "python -m megachiar sweep mine.yaml --cell threshold/seed_1\n" in calls
    assert "srun --cpus-per-task=3" in calls and "-m megachiar.pretrain --config out/my 1.yaml\n" in calls


@pytest.mark.parametrize(
    ("task", "env", "expected", "said"),
    [
        ("0", {"CONFIG": ""}, 0, ""),
        ("0", {"CONFIG": "", "REFUSAL": "1"}, 2, ""),
        ("2", {"CONFIG": "a.yaml"}, 2, "cells has no line 3"),
    ],
)
def test_a_task_of_a_sweep_without_a_cell_to_train_starts_no_rank(cluster, cells, task, env, expected, said):
    code, output, calls = cluster.run("sweep.sh", "mine.yaml", cells, SLURM_ARRAY_TASK_ID=task, **env)
    assert code == expected and said in output and "srun" not in calls and "requeue" not in calls, output


@pytest.fixture
def sweep(cluster) -> Path:
    """A sweep of which one variant is measured on another, beside its data."""
    for name in ("train", "valid"):
        write_tokens(cluster.folder / name)
    write_config(cluster.folder / "base.yaml", small_config(cluster.folder))
    variants = {"threshold": {"calibrate": {"run": "baseline"}}, "baseline": {"set": {"model.kind": "baseline"}}}
    sweep = {"base": "base.yaml", "folder": "out", "seeds": [1, 2], "variants": variants, "slurm": "--gres=gpu:2 -t 9"}
    (cluster.folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    return cluster.folder / "sweep.yaml"


def queue(cluster: Cluster, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megachiar", "sweep", "sweep.yaml", "--slurm"]
    done = subprocess.run(command, cwd=cluster.folder, env={**cluster.env, **env}, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def test_a_sweep_is_queued_as_arrays_that_wait_for_one_another(cluster, sweep):
    done = queue(cluster)
    assert done.returncode == 0, done.stderr
    rest = "slurm/sweep.sh sweep.yaml out/slurm.cells"
    assert [" ".join(call) for call in submitted(cluster.calls.read_text())] == [
        f"--parsable --array=0,2 --gres=gpu:2 -t 9 {rest}",
        f"--parsable --array=1,3 --gres=gpu:2 -t 9 --dependency=afterany:77 --kill-on-invalid-dep=yes {rest}",
    ]
    listed = (cluster.folder / "out" / "slurm.cells").read_text().split()
    assert listed == ["baseline/seed_1", "threshold/seed_1", "baseline/seed_2", "threshold/seed_2"]
    assert "job array 77 trains 2 cells (baseline/seed_1, baseline/seed_2)" in done.stderr
    done = queue(cluster, QUEUED="77 PENDING")
    assert done.returncode == 2 and "jobs 77,77 still work on it" in done.stderr
    assert len(submitted(cluster.calls.read_text())) == 2


def test_a_sweep_of_which_slurm_refuses_a_part_is_not_queued(cluster, sweep):
    done = queue(cluster, REFUSED="afterany")
    assert done.returncode == 2 and "failed: exit code 1" in done.stderr
    assert cluster.calls.read_text().splitlines()[-1] == "scancel 77"
    assert not (cluster.folder / "out" / "slurm.jobs").exists()
    (cluster.folder / "slurm").unlink()
    done = queue(cluster)
    assert done.returncode == 2 and "holds no slurm/sweep.sh" in done.stderr
