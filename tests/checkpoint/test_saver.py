"""A checkpoint is written while training goes on, and whatever happens meanwhile: what is on the disk is whole."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import WORKERS, damage_of, pretrain, run_ranks, small_config, start_ranks, write_config, write_tokens

from megachiar.checkpoint import save
from megachiar.checkpoint.format import (
    add_validation,
    checkpoint_name,
    complete_checkpoints,
    find_damage,
    fingerprint_of,
    read_state,
)
from megachiar.checkpoint.removal import best_checkpoint
from megachiar.checkpoint.save import SaveError, write_checkpoint
from megachiar.checkpoint.sharded_tensors import HostMemory, ShardWriter
from megachiar.checkpoint.snapshot import Snapshot
from megachiar.config import load_config
from megachiar.data.sampling.history import DataHistory
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.storage.files import bin_path
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.planning.rank_plan import plan_ranks
from megachiar.topology import Topology
from megachiar.training.metrics import read_metrics

STEPS = 6


def make_run(folder: Path, **checkpoint: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    config = small_config(folder, checkpoint={"every": 2, "keep": None, **checkpoint})
    config["training"] |= {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1}
    config["model"]["dropout"] = 0.1
    return write_config(folder / "config.yaml", config)


def train_with(
    fault: dict[str, object], config: Path, *sets: str, codes: Sequence[int] = (0,), ranks: int = 2
) -> list[str]:
    """Train on two ranks whose disk has ``fault``; see ``faulty_save_worker.py``."""
    program = (WORKERS / "faulty_save_worker.py", json.dumps(fault), "--config", config)
    return run_ranks(2, *program, *(["--set", *sets] if sets else []), codes=codes)


def saved(folder: Path) -> list[int]:
    return [read_state(path).step for path in complete_checkpoints(folder / "run" / "checkpoints")]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / checkpoint_name(step)


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    return {r["step"]: (r["loss"], r["gradient_norm"]) for r in read_metrics(folder / "run", "train")}


def tensors(path: Path) -> dict[str, str]:
    """Return the checksums of the files of tensors."""
    state = read_state(path)
    return {name: state.checksums[name] for name in state.tensor_files}


@pytest.mark.parametrize("stage", [0, 3])
def test_the_loop_goes_on_and_what_is_written_is_what_the_step_left(tmp_path, stage):
    """Writing takes longer than several steps; yet each file is bit for bit what a save writes that is waited for."""
    zero = f"parallel.zero_stage={stage}"
    config = make_run(tmp_path / "background")
    output = train_with({"seconds": 0.5}, config, zero)[0]
    waited = make_run(tmp_path / "waited", asynchronous=False)
    train_with({}, waited, zero)
    assert saved(tmp_path / "background") == saved(tmp_path / "waited") == [2, 4, 6]
    for step in (2, 4, 6):
        ours, theirs = checkpoint(tmp_path / "background", step), checkpoint(tmp_path / "waited", step)
        assert damage_of(ours) is None
        assert tensors(ours) == tensors(theirs)
    assert losses(tmp_path / "background") == losses(tmp_path / "waited")
    assert output.index("step 3/6") < output.index(f"saved {checkpoint(tmp_path / 'background', 2)}")


def test_a_full_disk_on_one_rank_ends_all_ranks_at_the_next_step(tmp_path):
    config = make_run(tmp_path)
    outputs = train_with({"full": [4], "rank": 1}, config, codes=(2,))
    assert [output.count("error:") for output in outputs] == [1, 0], outputs
    assert re.search(r"rank 1 on .*step_00000004\.incomplete: the checkpoint could not be written \([\d,]+ MiB free\): "
                     r"cannot write: No space left on device", " ".join(outputs[0].split()))  # fmt: skip
    assert "Traceback" not in "".join(outputs) and "remedy:" in outputs[0]
    assert saved(tmp_path) == [2]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [checkpoint_name(2)]


def test_a_run_that_is_to_continue_warns_counts_and_saves_the_next(tmp_path):
    config = make_run(tmp_path, on_failure="continue", every=1)
    output = train_with({"full": [2, 4], "rank": 1}, config)[0]
    assert saved(tmp_path) == [1, 3, 5, 6]
    said = " ".join(output.split())
    for count, step in ((1, 2), (2, 4)):
        assert re.search(rf"step {step} is not saved: .*?MiB free.*?saves that failed so far: {count}", said), output
    assert sorted(losses(tmp_path)) == list(range(1, STEPS + 1))


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path):
    """The new checkpoint is good; the next save removes both old ones."""
    config = make_run(tmp_path, keep=1, on_failure="stop")
    output = train_with({"obstacle": [4, 2]}, config)[0]
    said = " ".join(output.split())
    assert said.count("was not removed, and takes space") == 1
    assert (
        f"{checkpoint(tmp_path, 2)} was not removed, and takes space: {checkpoint(tmp_path, 2)}: cannot write" in said
    )
    assert "is not saved" not in said and f"saved {checkpoint(tmp_path, 4)}" in said
    assert saved(tmp_path) == [6]


def test_the_last_checkpoint_must_be_written_even_if_the_run_is_to_continue(tmp_path):
    config = make_run(tmp_path, on_failure="continue")
    output = train_with({"full": [STEPS], "rank": 0}, config, codes=(2,))[0]
    assert "could not be written" in output and "error:" in output
    assert saved(tmp_path) == [2, 4]


def test_a_signal_waits_for_the_save_that_is_under_way(tmp_path):
    config = make_run(tmp_path)
    sets = ["training.steps=100000", "checkpoint.every=3"]
    program = (WORKERS / "faulty_save_worker.py", json.dumps({"seconds": 1.5}), "--config", config, "--set", *sets)
    ranks = start_ranks(2, *program)
    under_way = tmp_path / "run" / "checkpoints" / f"{checkpoint_name(3)}.incomplete"
    wait_for(under_way.exists, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_STOPPED] * 2, outputs
    assert saved(tmp_path)[0] == 3 and len(saved(tmp_path)) == 2
    assert all(damage_of(path) is None for path in complete_checkpoints(tmp_path / "run" / "checkpoints"))


def wait_for(condition: Any, processes: list[Any]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        assert time.monotonic() < until
        time.sleep(0.002)


def test_killed_while_a_thread_writes_the_run_ends_bit_identical(tmp_path):
    make_run(tmp_path / "undisturbed")
    pretrain(tmp_path / "undisturbed" / "config.yaml", ranks=2)
    config = make_run(tmp_path / "killed")
    folder = tmp_path / "killed" / "run" / "checkpoints"
    for step in (2, 4):
        program = (WORKERS / "faulty_save_worker.py", json.dumps({"seconds": 0.5}), "--config", config)
        ranks = start_ranks(2, *program)
        wait_for((folder / f"{checkpoint_name(step)}.incomplete").exists, ranks)
        time.sleep(0.1 * step)
        for rank in ranks:
            rank.kill()
            rank.wait()
        assert all(find_damage(path) is None for path in folder.glob("step_????????"))
        pretrain(config, f"training.steps={step}", "schedule.decay_steps=6", ranks=2)
    pretrain(config, ranks=2)
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    assert tensors(checkpoint(tmp_path / "killed", STEPS)) == tensors(checkpoint(tmp_path / "undisturbed", STEPS))


def test_multiples_and_the_best_are_kept_beside_the_newest(tmp_path):
    config = make_run(tmp_path, every=1, keep=1, keep_every=4, keep_best="valid")
    sets = ["training.steps=9", "training.evaluate_every=1", "optimizer.learning_rate=0.1"]
    pretrain(config, *sets)
    measured = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run", "evaluation/valid")}
    best = min(measured, key=measured.__getitem__)
    assert best not in (4, 8, 9), "another rule would keep it anyway"
    assert saved(tmp_path) == sorted({4, 8, 9, best})
    assert read_state(checkpoint(tmp_path, best)).validation == {"valid": measured[best]}


def test_a_loss_that_is_measured_after_the_save_counts_and_the_checkpoint_stays_the_same_one(trained_run, tmp_path):
    """A rollback and the other ranks know a checkpoint by its fingerprint."""
    folder = shutil.copytree(trained_run / "run" / "checkpoints", tmp_path / "checkpoints")
    checkpoints = complete_checkpoints(folder)
    fingerprints = [fingerprint_of(path) for path in checkpoints]
    assert len(set(fingerprints)) == len(checkpoints)
    before = read_state(checkpoints[0])
    assert best_checkpoint(checkpoints, "valid") == checkpoints[-1], "the only one after which the run evaluated"
    add_validation(checkpoints[0], {"valid": 0.5, "other": 2.0})
    add_validation(checkpoints[0], {"other": 1.25})
    assert read_state(checkpoints[0]) == before.model_copy(update={"validation": {"valid": 0.5, "other": 1.25}})
    assert damage_of(checkpoints[0]) is None and [fingerprint_of(path) for path in checkpoints] == fingerprints
    assert best_checkpoint(checkpoints, "valid") == checkpoints[0]
    record = checkpoints[0] / "state.json"
    record.write_bytes(record.read_bytes().replace(b"1.25", b"1.75"))
    with pytest.raises(UserError, match="its seal does not fit"):
        add_validation(checkpoints[0], {"other": 1.0})


def test_losses_on_other_validation_data_are_not_compared(tmp_path):
    """The new data are harder: by its loss alone the checkpoint that was best on the old ones would stay for ever."""
    config = make_run(tmp_path, every=1, keep=1, keep_best="valid")
    sets = ["training.evaluate_every=1", "schedule.decay_steps=6"]
    pretrain(config, *sets, "training.steps=3")
    tokens = np.fromfile(bin_path(tmp_path / "valid"), np.uint16)
    np.random.default_rng(0).permutation(tokens).tofile(bin_path(tmp_path / "valid"))
    (output,) = pretrain(config, *sets)
    assert "data.validation.valid holds other data than up to here" in " ".join(output.split())
    measured = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run", "evaluation/valid")}
    assert min(measured, key=measured.__getitem__) <= 3 < min(saved(tmp_path))


def test_a_run_goes_back_to_a_named_step_once(tmp_path):
    config = make_run(tmp_path, every=1)
    pretrain(config)
    whole = losses(tmp_path)
    back = ["checkpoint.resume=3", "schedule.decay_steps=6"]
    (output,) = pretrain(config, *back, "training.steps=5")
    assert f"resumed from {checkpoint(tmp_path, 3)}" in output and "step_00000006.set_aside" in output
    assert saved(tmp_path) == [1, 2, 3, 4, 5]
    names = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*.set_aside")}
    assert names == {f"{checkpoint_name(step)}.set_aside" for step in (4, 5, 6)}
    (output,) = pretrain(config, *back)  # started again, it does not go back a second time
    assert f"resumed from {checkpoint(tmp_path, 5)}" in output
    assert losses(tmp_path) == whole
    (output,) = pretrain(config, "checkpoint.resume=77", codes=(2,))
    assert "checkpoint.resume 77" in output and "is not there" in output and "Traceback" not in output


def snapshot_of(folder: Path, tensor: torch.Tensor) -> Snapshot:
    """Return what a run of one rank saves that has one weight."""
    config = load_config(make_run(folder))
    shards = ShardWriter(Topology(rank=0, world_size=1, local_rank=0, data_rank=0, data_size=1))
    shards.add("w", None, tensor, None)
    data = DataHistory.initial([(SourceRecord(path="train", tokens=9, checksum=None), 1.0)], 32, 4, 1, "keyed")
    fields = {"step": 7, "samples": 28, "data": data, "optimizer_steps": 7, "loss_scale": None, "layout": "one rank"}
    return Snapshot(7, config, fields, shards)


def test_the_planner_knows_the_memory_of_a_snapshot(trained_run):
    (path, *_) = complete_checkpoints(trained_run / "run" / "checkpoints")
    held = 0
    for kind in ("weights", "optimizer"):  # the first tensor-parallel rank writes what both have as well
        with safe_open(path / f"{kind}-p00-t00-d00.safetensors", "pt") as file:
            held += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    (plan,) = plan_ranks(load_config(trained_run / "config.yaml"), data_size=1)
    assert plan.snapshot == held


def alone(value: Any) -> list[Any]:
    return [value]


def test_too_little_space_is_one_message_before_anything_is_written(tmp_path, monkeypatch):
    snapshot = snapshot_of(tmp_path, torch.zeros(2**20))
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    monkeypatch.setattr(ShardWriter, "write", lambda self, folder: pytest.fail("nothing may be written"))
    with pytest.raises(SaveError, match=r"\(1 MiB free\): the checkpoint needs 4 MiB and 1 MiB are free") as caught:
        write_checkpoint(snapshot, alone, is_main=True)
    assert caught.value.remedy and not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_snapshot_is_a_copy(tmp_path):
    weight = torch.arange(6.0)
    snapshot = snapshot_of(tmp_path, weight)
    weight.zero_()
    path = write_checkpoint(snapshot, alone, is_main=True)
    assert damage_of(path) is None
    assert path.joinpath("weights-p00-t00-d00.safetensors").read_bytes().endswith(torch.arange(6.0).numpy().tobytes())


def test_the_next_snapshot_uses_the_memory_of_the_last():
    """Memory that is new to the process would cost more time than the copy."""
    memory, topology = HostMemory(), Topology(rank=0, world_size=1, local_rank=0, data_rank=0, data_size=1)
    places = []
    for shape in ((4, 2), (4, 2), (8,)):
        ShardWriter(topology, memory).add("w", None, torch.ones(shape), None)
        places.append(memory.tensor("w", torch.Size(shape)).data_ptr())
        assert memory.tensor("w", torch.Size(shape)).tolist() == torch.ones(shape).tolist()
    assert places[0] == places[1] != places[2]


def test_a_defect_in_the_thread_is_raised_and_keeps_no_other_rank_waiting(tmp_path, monkeypatch):
    snapshot = snapshot_of(tmp_path, torch.zeros(4))
    told: list[Any] = []

    def gather(value: Any) -> list[Any]:
        told.append(value)
        return [value]

    monkeypatch.setattr(ShardWriter, "write", lambda self, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(snapshot, gather, is_main=True)
    assert "saving failed: ZeroDivisionError" in str(told[-1][2])
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("what", ["a damaged checkpoint", "a file"])
def test_what_is_in_the_way_of_a_step_is_replaced(tmp_path, what):
    snapshot = snapshot_of(tmp_path, torch.ones(4))
    path = write_checkpoint(snapshot, alone, is_main=True)
    (path / "weights-p00-t00-d00.safetensors").write_bytes(b"damaged")
    if what == "a file":
        shutil.rmtree(path)
        path.write_text("no folder")
    write_checkpoint(snapshot, alone, is_main=True)
    assert damage_of(path) is None
    write_checkpoint(snapshot, alone, is_main=True)
    assert [p.name for p in path.parent.iterdir() if p.is_dir()] == [path.name]
