"""A run that was saved under one layout continues under another as if nothing had changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import pretrain, small_config, write_config, write_tokens

from megachiar.checkpoint.checksums import FileRecord
from megachiar.checkpoint.format import complete_checkpoints
from megachiar.checkpoint.reading import read_weights
from megachiar.checkpoint.sharded_tensors import HostMemory, ShardReader, ShardWriter
from megachiar.errors import UserError
from megachiar.parallel.shard import Shard
from megachiar.topology import TensorParallelGroup, Topology
from megachiar.training.metrics import read_metrics

TP2, PP2, SP = "parallel.tensor_size=2", "parallel.pipeline_size=2", "parallel.sequence=true"
# One run continues under one layout after another: (ranks, overrides, last step).
JOURNEY = [
    (1, ["parallel.zero_stage=0"], 2),
    (2, [TP2], 4),
    (4, [TP2, PP2, SP], 6),
    (1, ["training.micro_batch_size=4"], 8),
    (4, [PP2], 10),
    (4, [TP2], 12),
    (2, ["parallel.zero_stage=3"], 14),
    (2, [PP2, "training.activation_checkpoint_interval=1"], 16),
    (2, ["parallel.zero_stage=2", "training.micro_batch_size=1"], 18),
]

# Muon needs whole matrices, and has one moment of them. Its run goes through the layouts that cut matrices otherwise.
MUON_JOURNEY = [
    (1, ["parallel.zero_stage=0"], 2),
    (4, [TP2], 4),
    (2, [PP2], 6),
    (2, ["parallel.zero_stage=2", "training.micro_batch_size=1"], 8),
]

# Shapes of routed layers that follow the routes, or do not. Three operators have no other shapes, so there are two.
SHAPES = "training.static_shapes="
SHAPES_JOURNEY = [
    (1, [SHAPES + "false", "parallel.zero_stage=0"], 2),
    (2, [SHAPES + "true", "parallel.zero_stage=2", "training.micro_batch_size=1"], 4),
    (2, [SHAPES + "true", PP2, "training.activation_checkpoint_interval=1"], 6),
    (1, [SHAPES + "false"], 8),
]
THREE = {"router": {"tau_low": 0.77, "tau_high": 0.81, "operators": ["dct", "rbf", "attention"]}}
ADAMW, MUON = "optimizer.kind=adamw", "optimizer.kind=muon"
JOURNEYS = {
    "adamw": (THREE, ADAMW, JOURNEY),
    "muon": (THREE, MUON, MUON_JOURNEY),
    "static shapes": ({}, ADAMW, SHAPES_JOURNEY),
}


def make_run(folder: Path, model: dict = THREE) -> Path:
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    config = small_config(folder, checkpoint={"every": 1, "keep": 2}, schedule={"decay_steps": 18})
    config["model"] |= {"dropout": 0.1} | model
    return write_config(folder / "config.yaml", config)


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_run_goes_on_under_any_layout(tmp_path, name):
    model, optimizer, legs = JOURNEYS[name]
    config = make_run(tmp_path, model)
    last = legs[-1][2]
    pretrain(config, optimizer, f"training.steps={last}", f"logging.folder={tmp_path / 'undisturbed'}")
    for ranks, sets, step in legs:
        output = pretrain(config, optimizer, f"training.steps={step}", *sets, ranks=ranks)[0]
        assert step == 2 or "resumed from" in output
    undisturbed, journey = (read_metrics(tmp_path / name, "train") for name in ("undisturbed", "run"))
    assert [r["step"] for r in journey] == [r["step"] for r in undisturbed] == list(range(1, last + 1))
    for key in ("loss", "gradient_norm"):
        expected = np.array([r[key] for r in undisturbed])
        assert np.abs(np.array([r[key] for r in journey]) / expected - 1).max() <= 2e-6, key
    ours, theirs = (
        read_weights(complete_checkpoints(tmp_path / n / "checkpoints")[-1]) for n in ("run", "undisturbed")
    )
    assert set(ours) == set(theirs)
    assert any(n.endswith("rbf.frequencies") for n in ours) == (model is THREE)
    distance = sum((ours[n] - theirs[n]).double().square().sum() for n in ours)
    assert (distance / sum(t.double().square().sum() for t in theirs.values())).sqrt() <= 1e-5


def test_ranks_share_the_writing_and_no_number_is_written_twice(tmp_path):
    config = make_run(tmp_path)
    pretrain(config, "training.steps=1", TP2, PP2, ranks=4, fresh=True)  # each rank iterates over sets in another order
    (checkpoint,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    sizes = {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}
    assert len(sizes) == 8
    numbers = 0
    for path in checkpoint.glob("weights-*.safetensors"):
        with safe_open(path, "pt") as file:
            numbers += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert numbers == sum(tensor.numel() for tensor in read_weights(checkpoint).values())


@pytest.mark.parametrize("writers", [1, 2, 3, 6])
@pytest.mark.parametrize("readers", [1, 2, 3, 6])
@pytest.mark.parametrize("shard", [None, Shard(0), Shard(1), Shard(0, 2)], ids=str)
def test_any_cut_is_read_from_any_other(tmp_path, writers, readers, shard):
    """Compare with numpy a tensor of distinct numbers that is written in one layout's shards and read in another's.

    The ranks' writers use the same memory, as the saves of one rank do.
    """
    memory = HostMemory()
    whole = torch.arange(12 * 18, dtype=torch.float32).view(12, 18)
    files: dict[str, FileRecord] = {}
    for rank in range(writers):
        writer = ShardWriter(_place(rank, writers), memory)
        piece = whole if shard is None else torch.from_numpy(_cut(whole.numpy(), shard, rank, writers))
        if writer.is_mine(shard):
            writer.add("w", None, piece, shard if writers > 1 else None)
        files |= writer.write(tmp_path)
    reader = ShardReader(tmp_path, files)
    assert torch.equal(reader.whole("w"), whole)
    for rank in range(readers):
        part = reader.part("w", shard if readers > 1 else None, TensorParallelGroup(rank, readers))
        expected = whole.numpy() if shard is None or readers == 1 else _cut(whole.numpy(), shard, rank, readers)
        np.testing.assert_array_equal(part.numpy(), expected)


@pytest.mark.parametrize("ranks", [(0,), (1, 2), (0, 1, 1, 2)], ids=str)
def test_shards_that_are_missing_or_twice_there_are_one_message(tmp_path, ranks):
    """Memory that no file fills would else become weights."""
    files = []
    for number, rank in enumerate(ranks):
        writer = ShardWriter(_place(rank, 3))
        writer.is_mine(Shard(0))
        writer.add("w", None, torch.ones(4, 2), Shard(0))
        (written,) = writer.write(tmp_path)
        files.append(f"{number}-{written}")
        (tmp_path / written).rename(tmp_path / files[-1])
    with pytest.raises(UserError, match="the files hold w in part"):
        ShardReader(tmp_path, files).whole("w")


def _cut(whole: np.ndarray, shard: Shard, rank: int, size: int) -> np.ndarray:
    blocks = np.split(whole, shard.blocks, shard.dim)
    return np.concatenate([np.split(block, size, shard.dim)[rank] for block in blocks], shard.dim)


def _place(rank: int, size: int) -> Topology:
    return Topology(
        rank=rank, world_size=size, local_rank=rank, data_rank=0, data_size=1, tensor=TensorParallelGroup(rank, size)
    )
