"""The scale at which rows enter the layers, and the edges of the thresholds that send all tokens to one operator."""

from __future__ import annotations

import pytest
import torch
from model_cases import THREE, small_model_config, token_batch

from megachiar.model import build_model
from megachiar.model.layer import RoutedLayer


def scales(kind: str, multiplier: float, norm: str = "pre") -> list[float]:
    """Standard deviation of the rows that enter each layer of a new model at d = 256."""
    config = small_model_config(
        kind=kind, norm=norm, hidden_size=256, ffn_hidden_size=None, embedding_multiplier=multiplier
    )
    model = build_model(config, seed=0).eval()
    found: list[float] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0].std().item()))
    with torch.inference_mode():
        model(token_batch(8, 16))
    return found


def test_rows_enter_the_first_layer_at_the_embedding_s_scale():
    assert scales("chiar", 1.0)[0] == pytest.approx(0.02, rel=0.05)
    assert scales("chiar", 50.0)[0] == pytest.approx(1.0, rel=0.05)


def test_without_the_multiplier_the_baseline_starts_at_another_scale_than_chiar():
    chiar, baseline = scales("chiar", 1.0)[1], scales("baseline", 1.0)[1]
    assert chiar > 5 * baseline


def test_with_the_multiplier_both_start_at_one_scale():
    chiar, baseline = scales("chiar", 50.0)[1], scales("baseline", 50.0)[1]
    assert 1 < chiar / baseline < 2  # DCT mixing with a filter of ones adds each row to itself


def test_the_head_has_the_weight_as_it_is():
    config = small_model_config(embedding_multiplier=50.0)
    embedding = build_model(config, seed=0).embedding
    hidden_states = torch.randn(5, 32)
    torch.testing.assert_close(embedding(hidden_states), hidden_states @ embedding.weight.T)
    tokens = torch.tensor([3, 4])
    torch.testing.assert_close(embedding(tokens), 50 * embedding.weight[tokens])


ROWS = torch.cat([torch.zeros(2, 128), torch.ones(2, 128), torch.eye(128)[:2], torch.randn(4, 128)])
"""Rows of H = 0 (zeros, constants), and others."""


@pytest.mark.parametrize("d", (32, 128))  # with the matrix product and with the FFT
@pytest.mark.parametrize(
    ("router", "operator"),
    [
        ({"tau": 0.0}, 1),
        ({"tau": 1.0}, 0),
        ({"kind": "random", "attention_share": 1.0}, 1),
        ({"kind": "random", "attention_share": 0.0}, 0),
        ({"operators": THREE, "tau_low": 0.0, "tau_high": 0.0}, 2),
        ({"operators": THREE, "tau_low": 0.0, "tau_high": 1.0}, 1),
        ({"operators": THREE, "tau_low": 1.0, "tau_high": 1.0}, 0),
    ],
)
def test_thresholds_of_0_and_1_hold_for_every_row(router, operator, d):
    model = build_model(small_model_config(hidden_size=d, router=router), seed=0)
    routed = model.layers[1]
    assert isinstance(routed, RoutedLayer)
    taken = []
    routed.router.register_forward_hook(lambda _, __, decision: taken.append(decision.operator))
    model.layers[0].register_forward_hook(lambda _, __, output: output._replace(hidden_states=ROWS[:, :d].clone()))
    model(token_batch(2, 5))
    assert taken[0].tolist() == [operator] * 10


@pytest.mark.parametrize(
    ("router", "share"),
    [
        ({"tau": 0.0}, 1.0),
        ({"tau": (0.0, 0.0)}, 1.0),
        ({"tau": 1.0}, 0.0),
        ({"tau": (0.0, 1.0)}, 0.5),
        ({"tau": 0.8}, 0.5),
        ({"operators": THREE, "tau_low": 0.0, "tau_high": 0.0}, 1.0),
        ({"kind": "random", "attention_share": 0.3}, 0.3),
    ],
)
def test_plans_know_the_share_of_a_router_that_sends_all_tokens_one_way(router, share):
    assert small_model_config(router=router).expected_attention_share == share
