"""Which runs have static shapes, and what a log and an error say where they have not."""

from __future__ import annotations

import json

import pytest
import torch
from support import pretrain, small_config, write_config, write_tokens

from megachiar.config import load_config
from megachiar.errors import UserError
from megachiar.kernels import gpu
from megachiar.model.static_shapes import describe_static_shapes, has_static_shapes

CPU, GPU = torch.device("cpu"), torch.device("meta")
SHAPES = "training.static_shapes"
LEARNED = ["model.router.kind=learned", "model.router.tau=null", "model.router.target_share=0.4"]
LONG = ["data.sequence_length=4096", "model.max_sequence_length=4096", "model.attention.keys=routed"]


@pytest.fixture
def load(tmp_path):
    path = write_config(tmp_path / "config.yaml", small_config(tmp_path))
    return lambda *overrides: load_config(path, list(overrides))


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setattr(gpu, "why_not", lambda device: None)


def test_a_gpu_with_kernels_has_static_shapes_by_default(load, triton):
    assert has_static_shapes(load(), GPU)
    assert describe_static_shapes(load(), GPU) == "routed layers of static shapes"
    assert not has_static_shapes(load(f"{SHAPES}=false"), GPU)


def test_a_cpu_has_them_where_they_are_demanded(load):
    assert not has_static_shapes(load(), CPU)
    assert describe_static_shapes(load(), CPU) is None, "the log's line about kernels says that it is a CPU"
    assert has_static_shapes(load(f"{SHAPES}=true"), CPU)


def test_a_model_without_routed_layers_has_none(load, triton):
    baseline = load("model.kind=baseline")
    assert not has_static_shapes(baseline, GPU) and describe_static_shapes(baseline, GPU) is None


@pytest.mark.parametrize(
    ("reason", "overrides"),
    [
        ("router.kind is soft", ["model.router.kind=soft", "model.router.tau=null"]),
        ("router.kind is hard", ["model.router.kind=hard", "model.router.tau=null"]),
        ("router.kind is learned", LEARNED),
        ("tensor_size is 2", ["parallel.tensor_size=2"]),
        ("zero_stage is 3", ["parallel.zero_stage=3"]),
    ],
)
def test_what_cannot_have_them_says_why(load, triton, reason, overrides):
    assert reason in describe_static_shapes(load(*overrides), GPU)
    with pytest.raises(UserError, match=f"{SHAPES}: is true, but .*{reason}"):
        load(f"{SHAPES}=true", *overrides)


@pytest.mark.parametrize(
    ("reason", "overrides"),
    [
        ("heads have no 16, 32, 64, 128 channels", ["model.hidden_size=48", "model.num_attention_heads=4"]),
        ("routed keys of more than 2048 tokens", LONG),
    ],
)
def test_what_the_kernels_do_not_serve_says_why(load, triton, reason, overrides):
    assert reason in describe_static_shapes(load(*overrides), GPU)


@pytest.mark.parametrize(
    "overrides", [(), ("parallel.pipeline_size=2",), ("training.activation_checkpoint_interval=1",)]
)
def test_a_run_of_static_shapes_learns_the_same(tmp_path, overrides):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    config = small_config(tmp_path, model={"dropout": 0.1}, training={"steps": 3})
    records = []
    for shapes in ("false", "true"):
        sets = [f"{SHAPES}={shapes}", f"logging.folder={tmp_path}/{shapes}", *overrides]
        ranks = 2 if "parallel.pipeline_size=2" in overrides else 1
        output = pretrain(write_config(tmp_path / "config.yaml", config), *sets, ranks=ranks)[0]
        assert ("routed layers of static shapes" in " ".join(output.split())) == (shapes == "true")
        lines = (tmp_path / shapes / "metrics.jsonl").read_text().splitlines()
        records.append([record for record in map(json.loads, lines) if "loss" in record])
    plain, static = records
    assert len(plain) > 3  # of steps, and of the evaluation at the end
    for key in ("loss", "attention_share"):
        for one, other in zip(plain, static, strict=True):
            assert other.get(key) == pytest.approx(one.get(key), abs=1e-5)
