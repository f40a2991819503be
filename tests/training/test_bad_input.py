"""A user's mistake about a run gets one message with its remedy and exit code 2, and nothing is written."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, pretrain, process_environment, small_config, write_config, write_tokens

from megachiar.checkpoint.format import complete_checkpoints
from megachiar.data.storage.writer import IndexedDatasetBuilder


@pytest.fixture
def folder(tmp_path):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    write_config(tmp_path / "config.yaml", small_config(tmp_path))
    return tmp_path


def refused(folder: Path, *overrides: str, ranks: int = 1) -> str:
    """Return the output of a run that must be refused before it writes anything."""
    outputs = pretrain(folder / "config.yaml", *overrides, ranks=ranks, codes=(2,))
    assert "Traceback" not in "".join(outputs)
    assert sum(output.count("error:") for output in outputs) == 1, outputs
    assert "remedy:" in "".join(outputs)
    assert not (folder / "run").exists()
    return " ".join(" ".join(outputs).split())


def test_a_missing_dataset(folder):
    assert "nowhere.idx" in refused(folder, f"data.train.0.path={folder}/nowhere")


def test_a_truncated_dataset_is_told_by_one_rank_alone(folder):
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert "train.bin" in refused(folder, ranks=2)


def test_swapped_files(folder):
    binary, index = (folder / "train.bin").read_bytes(), (folder / "train.idx").read_bytes()
    (folder / "train.bin").write_bytes(index)
    (folder / "train.idx").write_bytes(binary)
    assert "train" in refused(folder)


def test_an_empty_dataset(folder):
    (folder / "train.bin").write_bytes(b"")
    assert "train.bin" in refused(folder)


def test_a_dataset_shorter_than_a_sample(folder):
    with IndexedDatasetBuilder(folder / "short", np.uint16) as builder:
        builder.add_document(np.arange(20, dtype=np.uint16))
    assert "short.bin" in refused(folder, f"data.train.0.path={folder}/short")


def test_a_world_size_that_does_not_fit(folder):
    assert "no multiple of micro_batch_size 2 * 3" in refused(folder, ranks=3)


def test_a_config_problem_is_told_once_by_several_ranks(folder):
    assert "training.steps: is 0" in refused(folder, "training.steps=0", ranks=2)


def test_ranks_that_make_no_replica(folder):
    assert "3 ranks are no multiple of pipeline_size 2" in refused(folder, "parallel.pipeline_size=2", ranks=3)


def test_heads_that_do_not_divide_are_refused_before_ranks_meet(folder):
    message = refused(folder, "parallel.tensor_size=4", ranks=4)
    assert "parallel.tensor_size: 4 does not divide model.num_attention_heads 2" in message


def test_apex_that_is_not_there(folder):
    assert "NVIDIA's apex" in refused(folder, "optimizer.implementation=apex")


def test_triton_without_a_gpu(folder):
    assert "precision.kernels: is triton, but the device is a CPU" in refused(folder, "precision.kernels=triton")


def test_raw_keys_that_deepspeed_refuses(folder):
    message = refused(folder, "deepspeed.zero_optimization.reduce_bucket_size=-1", "deepspeed.zero_optimization.x=1")
    assert "deepspeed: DeepSpeed refuses a raw key: reduce_bucket_size: Input should be greater than 0; x: " in message
    assert "has been removed" in refused(folder, "deepspeed.elasticity.enabled=true")


def test_weights_from_nowhere(folder):
    assert "no such folder" in refused(folder, f"checkpoint.load_from={folder}/nothing")


def test_an_id_above_the_vocabulary_ends_the_run_with_its_place(folder):
    # A dataset without a manifest does not record its vocabulary, so that the id is found when it is read.
    output = pretrain(folder / "config.yaml", "model.vocab_size=50", codes=(2,))[0]
    assert "train.bin" in output and "vocabulary is 0 to 49" in " ".join(output.split()), output
    assert "Traceback" not in output


def test_a_loss_that_is_no_number_ends_the_run(folder):
    output = pretrain(folder / "config.yaml", "optimizer.learning_rate=1e30", codes=(2,))[0]
    assert "the loss is" in output and "learning_rate" in output, output


def test_a_full_disk_while_saving_leaves_no_checkpoint_and_keeps_the_last(folder):
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small file system")
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        sets = [f"logging.folder={disk}/run", "checkpoint.every=1", "checkpoint.keep=null"]
        output = pretrain(folder / "config.yaml", *sets, codes=(2,))[0]
        assert "remedy:" in output and "Traceback" not in output, output
        checkpoints = disk / "run" / "checkpoints"
        assert not list(checkpoints.glob("*.incomplete"))
        saved = complete_checkpoints(checkpoints)
        assert saved and saved == sorted(checkpoints.glob("step_*"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_dead_rank_does_not_leave_the_others_waiting(folder):
    """A killed rank ends the whole run with an exit code other than 0, since the launcher ends the others."""
    import sys
    import time

    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + ["megachiar/pretrain.py", "--config", str(folder / "config.yaml"), "--set", "training.steps=100000"],
        cwd=ROOT,
        env=process_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = folder / "run" / "metrics.jsonl"
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            assert run.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), 9)
        assert run.wait(timeout=60) != 0
    finally:
        run.kill()
