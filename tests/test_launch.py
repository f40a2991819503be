"""Every way to start ends in the same environment."""

from __future__ import annotations

import os
import sys

import pytest
import torch.distributed as dist
from support import find_mpirun, python, rendezvous_port, small_config, write_config, write_tokens

from megachiar import launch
from megachiar.console import report
from megachiar.errors import UserError
from megachiar.topology import LaunchError


def test_alone_is_a_world_of_one():
    env = launch._rank_environment({})
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == ("0", "1", "0", "1")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", "0")  # two runs that start at once take two ports


SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "1234",
}


def test_srun_tasks_become_ranks():
    env = launch._rank_environment(SLURM)
    assert env == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}


def test_srun_without_a_rendezvous_is_refused():
    with pytest.raises(UserError, match="MASTER_ADDR or MASTER_PORT is not set"):
        launch._rank_environment({k: v for k, v in SLURM.items() if k != "MASTER_PORT"})


def test_the_shell_of_an_allocation_is_no_rank():
    shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}
    assert launch._rank_environment(shell)["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(("spec", "counts"), [("4(x2),3", [4, 4, 3]), ("2", [2, 2]), ("1,2,3(x2)", [1, 2, 3, 3])])
def test_tasks_per_node_of_slurm(spec, counts):
    assert [launch._tasks_on_node(spec, node) for node in range(len(counts))] == counts


def test_the_launchers_extra_argument_is_dropped():
    arguments = ["--local_rank=3", "--config", "a.yaml", "--set", "training.steps=1"]
    assert launch.drop_launcher_arguments(arguments) == arguments[1:]


def test_contradictory_ranks_are_refused(tmp_path):
    done = python("-m", "megachiar.pretrain", "--config", "configs/tiny.yaml", RANK="2", WORLD_SIZE="2")
    assert done.returncode == 2 and "RANK is 2 with WORLD_SIZE 2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but MASTER_ADDR and MASTER_PORT are not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "RANK is set, but MASTER_PORT is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', not a"),
        ({"RANK": "0"}, "WORLD_SIZE is None, not a number"),
    ],
)
def test_an_incomplete_environment_is_one_message(variables, message, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(variables))
    with pytest.raises(UserError, match=message):
        launch.prepare_environment()


def test_a_world_of_one_needs_no_address(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "1"})
    launch.prepare_environment()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "0")


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("8", False)])
def test_an_error_of_all_ranks_is_printed_by_rank_0_once_they_have_met(monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    report(LaunchError("parallel", "3 ranks are no multiple of 2", "start 4"))
    assert ("3 ranks are no multiple of 2" in capsys.readouterr().err) == printed


@pytest.fixture
def config(tmp_path):
    write_tokens(tmp_path / "train")
    return write_config(
        tmp_path / "config.yaml",
        small_config(tmp_path, data={"validation": {}}, training={"steps": 2}, checkpoint={"every": None}),
    )


DEEPSPEED = ("-m", "deepspeed.launcher.runner")
TWO_RANKS = ("--num_gpus", "2", "--master_port", "FREE")  # its own port, 29500, may be in use
COMMAND = ("megachiar", "pretrain")  # the launcher puts --local_rank=N between the two
LAUNCHERS = {
    "python -m": ["-m", "megachiar.pretrain"],
    "python file": ["megachiar/pretrain.py"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "megachiar/pretrain.py"],
    "deepspeed": [*DEEPSPEED, "megachiar/pretrain.py"],
    "deepspeed, 2 ranks": [*DEEPSPEED, *TWO_RANKS, "megachiar/pretrain.py"],
    "deepspeed, 2 ranks, no file": [*DEEPSPEED, *TWO_RANKS, "--module", *COMMAND],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_trains(config, name):
    port = str(rendezvous_port())
    done = python(*(part.replace("FREE", port) for part in LAUNCHERS[name]), "--config", config)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    ranks = 2 if "2" in name or name == "torchrun" else 1
    assert f"{ranks} x CPU" in output and "step 2/2" in output
    assert "FutureWarning" not in output


def test_mpirun_trains(config):
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("mpi4py and mpirun are not installed (extra: mpi)")
    from support import run_command

    done = run_command(mpirun, "-n", "2", sys.executable, "megachiar/pretrain.py", "--config", config)
    assert done.returncode == 0 and "2 x CPU" in done.stderr + done.stdout, done.stderr + done.stdout


def test_a_user_error_ends_deepspeed_with_exit_code_2(tmp_path):
    done = python("-m", "deepspeed.launcher.runner", "megachiar/pretrain.py", "--config", tmp_path / "none.yaml")
    assert done.returncode == 2 and "no such config file" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
