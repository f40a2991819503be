"""What Muon computes and sends, against counted products and against cuts that are made element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import small_config, write_config
from torch.utils.flop_counter import FlopCounterMode

from megachiar.cli.bench_train import allocated_peak
from megachiar.config import load_config
from megachiar.engine.muon import orthogonalised
from megachiar.engine.optimizer import build_optimizer
from megachiar.model import build_model
from megachiar.planning.muon import iteration_flops, split_sizes
from megachiar.planning.rank_plan import plan_ranks
from megachiar.topology import Topology


@pytest.mark.parametrize("shape", [(32, 32), (16, 40), (40, 16)], ids=str)
def test_products_are_those_that_are_counted(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalised(torch.ones(shape), 3)
    assert counter.get_total_flops() == 3 * iteration_flops(*shape)


@pytest.mark.parametrize("shares", [1, 2, 3, 5, 8])
def test_split_matrices_are_those_with_elements_on_two_ranks(shares):
    sizes = [64, 128, 64, 256, 256, 16, 64]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    padded = np.concatenate([owner, np.full(-len(owner) % (2 * shares), -1)])
    ranks = [set(part.tolist()) - {-1} for part in np.split(padded, shares)]
    expected = [size for number, size in enumerate(sizes) if sum(number in held for held in ranks) > 1]
    assert split_sizes(sizes, shares) == expected


def test_a_rank_sends_and_computes_what_its_layout_asks(tmp_path):
    path = write_config(tmp_path / "config.yaml", small_config(tmp_path, model={"kind": "baseline"}))

    def plan(kind: str, data_size: int, *sets: str):
        return plan_ranks(load_config(path, [f"optimizer.kind={kind}", *sets]), data_size)[0]

    alone, adamw = plan("muon", 1), plan("adamw", 1)
    d, f, layers = 32, 128, 4
    one_layer = 5 * (4 * iteration_flops(d, d) + 2 * iteration_flops(d, f))
    assert alone.muon.parameters == layers * (4 * d * d + 2 * d * f)
    assert alone.flops - adamw.flops == pytest.approx(layers * one_layer)
    assert alone.communication == adamw.communication
    two, replicated = plan("muon", 2), plan("muon", 2, "parallel.zero_stage=0")
    assert two.muon.flops == alone.muon.flops / 2 and replicated.muon.flops == alone.muon.flops
    assert replicated.muon.data == 0 == two.muon.data, "two layers each: no matrix is cut"
    assert plan("muon", 8).muon.data > 0
    shared = plan("muon", 1, "parallel.tensor_size=2")
    assert shared.muon.parameters == alone.muon.parameters / 2 and shared.muon.flops == alone.muon.flops
    assert shared.muon.tensor == pytest.approx(4 * alone.muon.parameters / 2)
    half = plan("muon", 1, "parallel.tensor_size=2", "optimizer.muon.ns_dtype=bf16")
    assert half.muon.tensor == shared.muon.tensor / 2


def test_working_memory_is_what_a_step_allocates(tmp_path):
    sizes = {"kind": "baseline", "hidden_size": 128, "num_layers": 2, "num_attention_heads": 4}
    path = write_config(tmp_path / "config.yaml", small_config(tmp_path, model=sizes, optimizer={"kind": "muon"}))
    config = load_config(path)
    model = build_model(config.model, seed=1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    built = build_optimizer(model, config.optimizer)
    built.place(0, Topology(rank=0, world_size=1, local_rank=0, data_rank=0, data_size=1))
    built.optimizer.step()  # makes the state
    memory = plan_ranks(config, 1)[0].memory
    assert memory.stepping == pytest.approx(allocated_peak(built.optimizer.step), rel=0.15)
    assert memory.total >= memory.state + memory.stepping
