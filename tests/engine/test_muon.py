"""Muon beside torch's own, and beside what an orthogonal step must be."""

from __future__ import annotations

import pytest
import torch
from support import small_config, write_config
from torch import nn

from megachiar.config import load_config
from megachiar.engine.muon import learning_rate_scale, orthogonalised
from megachiar.engine.optimizer import build_optimizer
from megachiar.errors import UserError
from megachiar.model import build_model
from megachiar.model.hidden_matrices import hidden_matrices
from megachiar.topology import Topology

ALONE = Topology(rank=0, world_size=1, local_rank=0, data_rank=0, data_size=1)
RBF = {"tau": None, "tau_low": 0.77, "tau_high": 0.81, "operators": ["dct", "rbf", "attention"]}


MATRICES = tuple(f".{name}.weight" for name in ("query", "key_value", "output", "up", "down"))


def muon_config(tmp_path, *sets):
    config = small_config(tmp_path, optimizer={"kind": "muon", "weight_decay": 0.1}, model={"router": RBF})
    return load_config(write_config(tmp_path / "config.yaml", config), list(sets))


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3


def theirs(config, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return torch's optimizers of a model; of its keys and values, torch's Muon gets one matrix each."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if name.endswith(MATRICES) else others).append(parameter)
    muon, optimizer = config.optimizer.muon, config.optimizer
    shared = {"lr": optimizer.learning_rate, "weight_decay": optimizer.weight_decay}
    adamw = {"lr": optimizer.learning_rate, "betas": optimizer.betas, "eps": optimizer.epsilon, "fused": True}
    vectors = [p for p in others if p.ndim < 2]
    return [
        torch.optim.Muon(
            matrices,
            momentum=muon.momentum,
            nesterov=muon.nesterov,
            ns_steps=muon.ns_steps,
            adjust_lr_fn=muon.adjust_lr_fn,
            **shared,
        ),
        torch.optim.AdamW([p for p in others if p.ndim == 2], weight_decay=optimizer.weight_decay, **adamw),
        torch.optim.AdamW(vectors, weight_decay=0.0, **adamw),
    ]


class Halves(nn.Module):
    """Keys and values of a layer as the two matrices that they are."""

    def __init__(self, whole: nn.Parameter):
        super().__init__()
        self.halves = nn.ParameterList(nn.Parameter(half.clone()) for half in whole.detach().chunk(2))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize(
    "sets",
    [[], ["optimizer.muon.adjust_lr_fn=original"], ["optimizer.muon.nesterov=false", "optimizer.muon.ns_steps=3"]],
    ids=["defaults", "original", "no nesterov, 3 steps"],
)
def test_steps_in_bf16_are_those_of_torch(tmp_path, sets):
    config = muon_config(tmp_path, "optimizer.muon.ns_dtype=bf16", *sets)
    ours, others = (build_model(config.model, seed=1) for _ in range(2))
    built = build_optimizer(ours, config.optimizer)
    built.place(0, ALONE)
    split = {name: p for name, p in others.named_parameters() if "key_value.weight" in name}
    halves = nn.ModuleDict({name.replace(".", "_"): Halves(p) for name, p in split.items()})
    optimizers = theirs(config, others)
    group = optimizers[0].param_groups[0]
    group["params"] = [p for p in group["params"] if not any(p is whole for whole in split.values())]
    group["params"] += list(halves.parameters())
    for step in range(3):
        gradients(ours, step)
        gradients(others, step)
        for name, whole in split.items():
            for half, gradient in zip(halves[name.replace(".", "_")].halves, whole.grad.chunk(2), strict=True):
                half.grad = gradient.clone()
        built.optimizer.step()
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in others.named_parameters():
        expected = torch.cat(list(halves[name.replace(".", "_")].halves)) if name in split else parameter
        assert torch.equal(dict(ours.named_parameters())[name], expected), name


@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48)], ids=str)
def test_a_step_has_singular_values_near_1(shape):
    """Five iterations of this quintic are known to bring what is at least 0.002 to between 0.68 and 1.21."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator, dtype=torch.float64))
    values = torch.linspace(0.02, 1, min(shape), dtype=torch.float64)
    update = orthogonalised((left * values @ right.mT).float(), 5).double()
    inner = left.mT @ update @ right
    found = inner.diagonal()
    assert found.min() >= 0.68, found.min()
    assert found.max() <= 1.21, found.max()
    assert (inner - found.diag()).abs().max() < 1e-4, "the singular vectors stay"
    assert not orthogonalised(torch.zeros(shape), 5).any()


def test_a_step_is_as_large_as_one_of_adamw():
    """By "match_rms_adamw" a change has a root mean square of 0.2 learning rates, whatever the shape of the matrix."""
    for shape in ((64, 64), (64, 256), (256, 64)):
        update = orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(1)), 5)
        scale = learning_rate_scale(*shape, "match_rms_adamw")
        assert (scale * update).square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_muon_has_the_matrices_between_hidden_states_alone(tmp_path):
    config = muon_config(tmp_path)
    model = build_model(config.model, seed=1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(matrix.parameter)] for matrix in hidden_matrices(model)}
    assert found == {name for name in names.values() if name.endswith(MATRICES)}
    assert len([name for name in found if "layers.1." in name]) == 3 + 2 + 1, found  # attention, feed-forward, RBF
    left = {name for name, p in model.named_parameters() if p.ndim == 2} - found
    assert left and all("embedding" in name or "router" in name for name in left), left


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["parallel.zero_stage=3"], ["optimizer.kind", "zero_stage 3", "zero_stage 0, 1 or 2"]),
        (
            ["parallel.offload_optimizer=true"],
            ["optimizer.kind", "set offload_optimizer to false"],
        ),
    ],
    ids=["ZeRO 3", "offload"],
)
def test_layouts_without_whole_matrices_are_refused_with_the_remedy(tmp_path, sets, words):
    with pytest.raises(UserError) as refusal:
        muon_config(tmp_path, *sets)
    message = str(refusal.value)
    assert all(word in message for word in words), message
