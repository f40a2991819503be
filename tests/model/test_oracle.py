"""The model against the oracle that computes every operator for every token and selects: values and all gradients."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from model_cases import KEYS_OF_ROUTED, ROUTERS, lively_model, small_model_config, token_batch
from model_oracle import Oracle, OracleResult

from megachiar.config.model import ModelConfig
from megachiar.config.sections import ParallelConfig
from megachiar.config.static_shapes import why_shapes_follow_routes
from megachiar.model import RoutingStatistics
from megachiar.model.static_shapes import use_static_shapes

EXPECTED_USE = {  # which operators take tokens
    "threshold": {0, 1},
    "threshold all dct": {0},
    "threshold all attention": {1},
    "threshold per layer": {0, 1},
    "threshold three": {0, 1, 2},
    "threshold three without rbf": {0, 2},
    "threshold three all rbf": {1},
    "hard": {0, 1},
    "hard dct only": {0, 1},
    "hard three": {0, 1, 2},
    "random": {0, 1},
    "random all dct": {0},
    "random all attention": {1},
    "random three": {0, 1, 2},
}


# Soft and hard routers compute attention for tokens that give no keys then, and the config refuses it.
WITH_ROUTED_KEYS = [name for name in ROUTERS if not name.startswith(("soft", "hard", "learned"))] + ["hard dct only"]


def compare(
    config: ModelConfig, tokens: torch.Tensor, shapes: str = "follow routes"
) -> tuple[OracleResult, RoutingStatistics]:
    """Check loss, regulariser, logits and gradients; returns what the oracle computed and what the model reports.

    Routed layers compute with ``shapes`` that follow the routes or, named ``static``, that do not.
    """
    model = lively_model(config)
    if shapes == "static":
        use_static_shapes(model)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    oracle = Oracle(config, weights | {n: b.clone() for n, b in model.named_buffers()})
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    if targets.numel() > 1:
        targets[0, -1] = -100
    expected = oracle(inputs)
    expected_loss = F.cross_entropy(expected.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(inputs).logits, expected.logits, rtol=0, atol=1e-11)
    output = model(inputs, targets)
    torch.testing.assert_close(output.loss, expected_loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.regulariser.double(), expected.regulariser, rtol=0, atol=1e-12)
    (output.loss + output.regulariser).backward()
    (expected_loss + expected.regulariser).backward()
    for name, parameter in model.named_parameters():
        want = weights[name].grad
        want = torch.zeros_like(parameter) if want is None else want
        assert parameter.grad is not None, f"{name} has no gradient"
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    return expected, output.statistics


def for_shapes(routers: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise a test by router and by the shapes that routed layers with it can have."""
    cases = [(router, "follow routes") for router in routers]
    for router in routers:
        if why_shapes_follow_routes(small_model_config(router=ROUTERS[router]), ParallelConfig()) is None:
            cases.append((router, "static"))
    return pytest.mark.parametrize(("router", "shapes"), cases, ids=[f"{r}, {s}" for r, s in cases])


@pytest.mark.parametrize("norm", ("post", "pre"))
@for_shapes(ROUTERS)
def test_routed_layers_compute_what_all_operators_and_a_choice_would(router, shapes, norm):
    config = small_model_config(router=ROUTERS[router], norm=norm)
    expected, statistics = compare(config, token_batch(3, 13), shapes)
    used = set(torch.stack(expected.operators).unique().tolist())
    if router in EXPECTED_USE:
        assert used == EXPECTED_USE[router], "the case does not test what it is named after"
    if config.router.kind != "soft":
        attention = len(config.router.operators) - 1
        shares = [0.0, *((o == attention).double().mean().item() for o in expected.operators), 1.0]
        assert statistics.attention_share.tolist() == pytest.approx(shares, abs=1e-6)
        rbf = [(o == 1).double().mean().item() if attention == 2 else 0.0 for o in expected.operators]
        assert statistics.rbf_share.tolist() == pytest.approx([0.0, *rbf, 0.0], abs=1e-6)
    assert statistics.entropy[1:-1].tolist() == pytest.approx([h.mean().item() for h in expected.entropies], abs=1e-6)
    assert statistics.entropy[[0, -1]].isnan().all()


@pytest.mark.parametrize("norm", ("post", "pre"))
@for_shapes(WITH_ROUTED_KEYS)
def test_keys_of_routed_tokens_alone(router, shapes, norm):
    compare(small_model_config(router=ROUTERS[router], norm=norm, **KEYS_OF_ROUTED), token_batch(3, 13), shapes)


OTHER_FIELDS = {
    "baseline post": {"kind": "baseline"},
    "baseline pre": {"kind": "baseline", "norm": "pre"},
    "embedding multiplier": {"embedding_multiplier": 7.0},
    "embedding multiplier pre": {"embedding_multiplier": 7.0, "norm": "pre"},
    "baseline pre, embedding multiplier": {"embedding_multiplier": 0.5, "norm": "pre", "kind": "baseline"},
    "pool batch": {"meta_router": {"pool": "batch"}},
    "pool none": {"meta_router": {"pool": "none"}},
    "published gate": {"meta_router": {"init": "published"}},
    "published dct": {"dct": {"gain": 2.0, "entropy_dc_weight": 2.0, "entropy_epsilon": 1e-8}},
    "rope base": {"attention": {"rope_base": 100.0}},
    "rbf": {"router": ROUTERS["threshold three"], "rbf": {"features": 8, "gamma": 0.3}},
    "norm epsilon": {"norm_epsilon": 1e-2},
    "two layers": {"num_layers": 2},
    "heads": {"num_attention_heads": 4, "ffn_hidden_size": None},
    "odd width": {"hidden_size": 30, "num_attention_heads": 3},
}


@pytest.mark.parametrize("fields", OTHER_FIELDS.values(), ids=OTHER_FIELDS)
def test_every_other_setting_computes_what_its_description_says(fields):
    compare(small_model_config(**fields), token_batch(3, 13))


@pytest.mark.parametrize(("sequences", "length"), [(1, 2), (5, 2), (1, 8)])
@for_shapes(("threshold", "threshold three", "random", "hard", "hashed"))
def test_single_tokens_and_single_sequences(router, shapes, sequences, length):
    compare(small_model_config(router=ROUTERS[router]), token_batch(sequences, length), shapes)
