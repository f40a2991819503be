"""A run goes on with the optimizer that it has, and a new run may take the weights to another one."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file
from support import pretrain

from megachiar.checkpoint.format import checkpoint_name
from megachiar.training.metrics import read_metrics


def test_moments_of_another_optimizer_are_refused_and_weights_are_taken(trained_run, tmp_path):
    config, two = trained_run / "config.yaml", ["parallel.tensor_size=1", "optimizer.kind=muon", "training.steps=4"]
    shutil.copytree(trained_run / "run" / "checkpoints", tmp_path / "own" / "checkpoints")
    (refused,) = pretrain(config, *two, f"logging.folder={tmp_path / 'own'}", codes=(2,))
    words = " ".join(refused.split())
    assert "has the optimizer state of adamw, but optimizer.kind is muon" in words, refused
    assert "set optimizer.kind to adamw, or start a new run in another logging.folder" in words, refused
    taken = [f"checkpoint.load_from={trained_run / 'run'}", f"logging.folder={tmp_path / 'new'}"]
    (refused,) = pretrain(config, *two, *taken, "checkpoint.load=all", codes=(2,))
    assert "set checkpoint.load to weights, which loads nothing else" in " ".join(refused.split()), refused
    pretrain(config, *two, *taken)
    assert len(read_metrics(tmp_path / "new", "train")) == 4
    (moments,) = (tmp_path / "new" / "checkpoints" / checkpoint_name(4)).glob("optimizer-*.safetensors")
    held = load_file(moments)
    assert "layers.3.operator.query.weight.momentum_buffer" in held and "embedding.weight.exp_avg_sq" in held
    assert not any(name.startswith("layers.3.operator.query.weight.exp_avg") for name in held), sorted(held)
    assert all(torch.isfinite(value).all() for value in held.values())
