"""How many parameters there are, how they start, and that every setting of ``model:`` is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import THREE, lively_model, small_model_config, token_batch
from pydantic import BaseModel

from megachiar.config import load_config
from megachiar.config.model import ModelConfig
from megachiar.engine.running_routers import RunningRouters, ValueSums, value_layers
from megachiar.inference.generation import generate
from megachiar.model import build_model

CONFIGS = Path(__file__).parents[2] / "configs"


def counted_by_hand(config: ModelConfig) -> int:
    d, layers = config.hidden_size, config.num_layers
    attention, feed_forward, dct, gate = 4 * d * d + 6 * d, 8 * d * d + 7 * d, 3 * d, d + 1
    ends = config.vocab_size * d + 2 * d + layers * feed_forward
    return ends + (layers * attention if config.kind == "baseline" else (layers - 1) * (attention + dct) + gate)


@pytest.mark.parametrize(("name", "expected"), [("400m", 400_043_009), ("400m_baseline", 404_159_488)])
def test_exact_parameter_counts_of_the_papers_models(name, expected):
    """400M against 404M: the first layer has a filter where the baseline has attention."""
    config = load_config(CONFIGS / f"{name}.yaml").model
    assert counted_by_hand(config) == expected
    model = build_model(config, seed=0, device="meta")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert model.parameter_count() == expected == sum(p.numel() for p in model.parameters())


def weights_of(seed: int = 0, **fields) -> dict[str, torch.Tensor]:
    return build_model(small_model_config(**fields), seed=seed).state_dict()


def test_a_weight_starts_the_same_whatever_else_is_built():
    small, large = weights_of(num_layers=4), weights_of(num_layers=7, router={"kind": "soft"})
    shared = [name for name in small if name in large and not name.startswith("layers.3.")]
    assert len(shared) > 40
    for name in shared:
        assert small[name].equal(large[name]), name


def test_building_leaves_pytorchs_generator_alone():
    def draw_after_building(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        build_model(small_model_config(), seed=seed)
        return torch.rand(1)

    assert draw_after_building(1).equal(draw_after_building(2))


def test_weights_depend_on_the_seed_and_on_their_name():
    first, second = weights_of(seed=1), weights_of(seed=2)
    name, other = "layers.1.attention.query.weight", "layers.2.attention.query.weight"
    assert not first[name].equal(second[name])
    assert not first[name].equal(first[other])
    assert first[name].equal(weights_of(seed=1)[name])


def test_initial_weights_have_the_distribution_that_is_claimed():
    state = weights_of(hidden_size=128, vocab_size=500, router={"tau_low": 0.5, "tau_high": 0.6, "operators": THREE})
    for name, value in state.items():
        if name.endswith("frequencies"):
            assert value.std().item() == pytest.approx(2**0.5, rel=0.05)
        elif "meta_router" in name:
            assert value.unique().tolist() == [2.0 if name.endswith("bias") else 0.0]
        elif name.endswith("bias"):
            assert not value.any(), name
        elif value.dim() == 1:  # filters and norms
            assert value.equal(torch.ones_like(value)), name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(value.mean().item()) < 5 * 0.02 / value.numel() ** 0.5, name


def test_the_published_gate_starts_in_the_middle():
    state = weights_of(hidden_size=512, meta_router={"init": "published"})
    assert state["layers.0.meta_router.gate.bias"] == 0
    assert state["layers.0.meta_router.gate.weight"].std().item() == pytest.approx(0.02, rel=0.15)
    for init, gate in (("published", 0.5), ("intended", 0.8808)):
        model = build_model(small_model_config(meta_router={"init": init}), seed=0)
        assert model(token_batch()).statistics.gate[0].item() == pytest.approx(gate, abs=0.005)


# Every field of the config -------------------------------------------------------------------------------------------

HARD_THREE = {"kind": "hard", "operators": THREE}
RANDOM = {"kind": "random", "attention_share": 0.4}
RANDOM_THREE = {"kind": "random", "operators": THREE, "attention_share": 0.3, "rbf_share": 0.2}
LEARNED = {"kind": "learned", "target_share": 0.4}
BOUNDS = {"operators": THREE, "tau_low": 0.77, "tau_high": 0.82}
REGULARISED = {"tau": 0.79, "collapse_weight": 0.1}
# field -> two configs that differ in it alone
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kind": ({}, {"kind": "baseline"}),
    "num_layers": ({}, {"num_layers": 5}),
    "hidden_size": ({}, {"hidden_size": 36}),
    "num_attention_heads": ({}, {"num_attention_heads": 4}),
    "ffn_hidden_size": ({}, {"ffn_hidden_size": 64}),
    "vocab_size": ({}, {"vocab_size": 40}),
    "max_sequence_length": ({"max_sequence_length": 4}, {"max_sequence_length": 8}),
    "dropout": ({}, {"dropout": 0.5}),
    "norm": ({}, {"norm": "pre"}),
    "norm_epsilon": ({}, {"norm_epsilon": 1e-2}),
    "initializer_std": ({}, {"initializer_std": 0.1}),
    "embedding_multiplier": ({}, {"embedding_multiplier": 3.0}),
    "dct.gain": ({}, {"dct": {"gain": 2.0}}),
    "dct.entropy_dc_weight": ({}, {"dct": {"entropy_dc_weight": 2.0}}),
    "dct.entropy_epsilon": ({}, {"dct": {"entropy_epsilon": 1e-3}}),
    "router.kind": ({"router": {"kind": "soft"}}, {"router": {"kind": "hard"}}),
    "router.hard_gradient": (
        {"router": {"kind": "hard"}},
        {"router": {"kind": "hard", "hard_gradient": "dct_only"}},
    ),
    "router.operators": ({"router": {"kind": "hard"}}, {"router": HARD_THREE}),
    "router.tau": ({}, {"router": {"tau": 0.8}}),
    "router.tau_low": ({"router": BOUNDS}, {"router": BOUNDS | {"tau_low": 0.75}}),
    "router.tau_high": ({"router": BOUNDS}, {"router": BOUNDS | {"tau_high": 0.85}}),
    "router.attention_share": ({"router": RANDOM}, {"router": RANDOM | {"attention_share": 0.8}}),
    "router.rbf_share": ({"router": RANDOM_THREE}, {"router": RANDOM_THREE | {"rbf_share": 0.6}}),
    "router.target_share": ({"router": LEARNED}, {"router": LEARNED | {"target_share": 0.8}}),
    "router.anneal_steps": ({"router": LEARNED}, {"router": LEARNED | {"anneal_steps": 4}}),
    "router.explore": ({"router": LEARNED}, {"router": LEARNED | {"explore": 0.2}}),
    "router.seed": ({"router": RANDOM}, {"router": RANDOM | {"seed": 1}}),
    "router.collapse_weight": ({}, {"router": REGULARISED}),
    "router.collapse_temperature": ({"router": REGULARISED}, {"router": REGULARISED | {"collapse_temperature": 0.1}}),
    "attention.keys": ({}, {"attention": {"keys": "routed"}}),
    "attention.rope_base": ({}, {"attention": {"rope_base": 100.0}}),
    "rbf.features": ({"router": BOUNDS}, {"router": BOUNDS, "rbf": {"features": 32}}),
    "rbf.gamma": ({"router": BOUNDS}, {"router": BOUNDS, "rbf": {"gamma": 3.0}}),
    "meta_router.pool": ({}, {"meta_router": {"pool": "batch"}}),
    "meta_router.init": ({}, {"meta_router": {"init": "published"}}),
}


def all_fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    names = set()
    for name, info in model.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        names |= all_fields(info.annotation, f"{prefix}{name}.") if nested else {prefix + name}
    return names


def behaviour(config: ModelConfig) -> list[float]:
    """Loss, regulariser and gradients of a training pass, size, running numbers after it, and what is generated."""
    model = build_model(config, seed=3)
    tokens = token_batch(3, 13)
    torch.manual_seed(0)
    output = model.train()(tokens[:, :-1], tokens[:, 1:])
    (output.loss + output.regulariser).backward()
    norms = [parameter.grad.norm().item() for parameter in model.parameters()]
    lively = lively_model(config).eval()
    sums = [ValueSums(1.0, 1.0, 1.0)] * len(value_layers(config))
    RunningRouters(model, config).follow(output.statistics.attention_share.tolist(), sums)
    running = [buffer.item() for name, buffer in model.named_buffers() if ".router." in name]
    output_of_lively = lively(tokens[:, :-1], tokens[:, 1:])
    new = [] if config.meta_router.pool == "batch" else generate(lively, tokens[0].tolist(), 8)
    losses = [output.loss, output.regulariser, output_of_lively.loss, output_of_lively.regulariser]
    return [*(value.item() for value in losses), model.parameter_count(), *norms, *running, *new]


def test_no_field_of_the_config_is_left_out_here():
    assert set(FIELDS) == all_fields(ModelConfig)


def test_the_seed_changes_the_permutations_of_a_hashed_router():
    before, after = ({"router": {"kind": "hashed", "tau": 0.79, "seed": seed}} for seed in (0, 1))
    assert behaviour(small_model_config(**before)) != behaviour(small_model_config(**after))


@pytest.mark.parametrize("features", (1, 3, 64))
def test_rbf_features_are_so_many_cosines_and_so_many_sines(features):
    """As the config says: 2R numbers, whose product comes near R exp(-gamma |x - y|^2 / R)."""
    config = small_model_config(router=BOUNDS, rbf={"features": features, "gamma": 0.7})
    model = build_model(config, seed=0, dtype=torch.float64)
    mixing = model.layers[1].rbf
    assert mixing.frequencies.shape == (32, features) and mixing.output.weight.shape == (32, 2 * features)
    phi = mixing._features(torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert phi.shape == (5, 2 * features)
    torch.testing.assert_close(phi.square().sum(1), torch.full((5,), float(features), dtype=torch.float64))
    tokens = token_batch()
    assert model(tokens[:, :-1], tokens[:, 1:]).loss.isfinite()


def test_rbf_features_give_the_kernel_that_the_config_names():
    gamma, features = 0.7, 2000
    config = small_model_config(router=BOUNDS, rbf={"features": features, "gamma": gamma})
    mixing = build_model(config, seed=0, dtype=torch.float64).layers[1].rbf
    x, y = 6 * torch.randn(2, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kernel = torch.exp(-gamma * (x - y).square().sum(1) / features)
    assert 0.2 < kernel.min() < kernel.max() < 0.8
    products = (mixing._features(x) * mixing._features(y)).sum(1) / features
    assert (products - kernel).abs().max() < 4.5 * (0.5 / features) ** 0.5


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_changes_what_the_model_does(field):
    before, after = (behaviour(small_model_config(**fields)) for fields in FIELDS[field])
    assert before == behaviour(small_model_config(**FIELDS[field][0])), "the comparison itself must be steady"
    assert before != after
