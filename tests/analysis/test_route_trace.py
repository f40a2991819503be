"""A trace of routes has what the model did, by scipy's DCT of its hidden states and by the layers' own statistics."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from model_cases import ROUTERS, VARIANTS, lively_model, small_model_config, token_batch

from megachiar.analysis.route_trace import record_routes, trace_routes
from megachiar.inference.generation import generate
from megachiar.model import ChiarFormer


def inputs_of_layers(model: ChiarFormer, tokens: torch.Tensor) -> tuple[list[torch.Tensor], object]:
    """Return the hidden states (B * T, d) that enter each layer, and the output of the pass."""
    rows: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0])) for layer in model.layers]
    with torch.no_grad():
        output = model(tokens)
    for hook in hooks:
        hook.remove()
    return rows, output


def entropy_by_scipy(rows: torch.Tensor, dc_weight: float = 1.0) -> np.ndarray:
    power = scipy.fft.dct(rows.double().numpy(), norm="ortho") ** 2
    power[:, 0] *= dc_weight
    return scipy.stats.entropy(power, axis=-1) / np.log(rows.shape[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_entropy_is_that_of_the_hidden_states_and_shares_are_those_of_the_statistics(variant):
    model, tokens = lively_model(small_model_config(**VARIANTS[variant])).eval(), token_batch()
    rows, output = inputs_of_layers(model, tokens)
    trace = trace_routes(model, tokens)
    assert trace.operators == model.config.router.operators
    for index, hidden_states in enumerate(rows):
        np.testing.assert_allclose(trace.entropy[index].flatten(), entropy_by_scipy(hidden_states), atol=1e-12)
        shares = torch.bincount(trace.operator[index].flatten(), minlength=3) / tokens.numel()
        if "soft" not in variant or not trace.routed[index]:
            attention = trace.operators.index("attention")
            assert shares[attention] == pytest.approx(output.statistics.attention_share[index].item(), abs=1e-6)
            rbf = shares[1] if len(trace.operators) == 3 else 0
            assert rbf == pytest.approx(output.statistics.rbf_share[index].item(), abs=1e-6)
    assert trace.routed == tuple(index in model.config.routed_layers for index in range(4))


@pytest.mark.parametrize("kind", ["soft", "soft three"])
def test_gates_of_a_soft_router_add_up_and_their_mean_is_the_share_that_is_logged(kind):
    model, tokens = lively_model(small_model_config(router=ROUTERS[kind])).eval(), token_batch()
    with torch.no_grad():
        statistics = model(tokens).statistics
    trace = trace_routes(model, tokens)
    assert trace.gates is not None and trace.gates.shape == (*trace.operator.shape, len(trace.operators))
    for index in (1, 2):
        gates = trace.gates[index]
        np.testing.assert_allclose(gates.sum(-1), 1)
        assert gates[..., -1].mean().item() == pytest.approx(statistics.attention_share[index].item(), rel=1e-6)
        assert torch.equal(gates.argmax(-1), trace.operator[index])
    assert trace.gates[[0, 3]].isnan().all()


def test_thresholds_route_by_the_entropy_of_scipy():
    model = lively_model(small_model_config(router=ROUTERS["threshold three"])).eval()
    tokens = token_batch(4, 16)
    rows, _ = inputs_of_layers(model, tokens)
    trace = trace_routes(model, tokens)
    for index in (1, 2):
        expected = np.digitize(entropy_by_scipy(rows[index]), [0.77, 0.82])
        assert set(expected) == {0, 1, 2}, "all three operators are taken, or this test shows little"
        np.testing.assert_array_equal(trace.operator[index].flatten(), expected)
    assert (trace.operator[0] == 0).all() and (trace.operator[3] == 2).all()


def test_the_published_weight_of_the_mean_counts():
    config = small_model_config(dct={"entropy_dc_weight": 2.0})
    model, tokens = lively_model(config).eval(), token_batch()
    rows, _ = inputs_of_layers(model, tokens)
    np.testing.assert_allclose(trace_routes(model, tokens).entropy[0].flatten(), entropy_by_scipy(rows[0], 2.0))


@pytest.mark.parametrize("pool", ["causal", "batch", "none"])
def test_the_gate_of_layer_1_blends_its_input_with_its_output(pool):
    """Layer 1 is g * f(x) + (1 - g) * x. Another bias, and so another g, changes x by (g' - g)(f(x) - x)."""
    model = lively_model(small_model_config(meta_router={"pool": pool})).eval()
    tokens = token_batch()
    trace = trace_routes(model, tokens)
    if pool == "none":
        assert trace.meta_gate is None
        return
    rows, output = inputs_of_layers(model, tokens)
    before, after = rows[0], rows[1]
    torch.testing.assert_close(trace.meta_gate.mean().float(), output.statistics.gate[0])
    bias = model.layers[0].meta_router.gate.bias
    with torch.no_grad():
        bias += 100  # g = 1
    whole = inputs_of_layers(model, tokens)[0][1]
    gate = trace.meta_gate.flatten()[:, None]
    torch.testing.assert_close(gate * whole + (1 - gate) * before, after, rtol=0, atol=1e-9)
    assert (trace.meta_gate.unique().numel() == 1) == (pool == "batch")


def test_losses_are_those_against_the_targets():
    model, tokens = lively_model(small_model_config()).eval(), token_batch(2, 9)
    trace = trace_routes(model, tokens[:, :-1], tokens[:, 1:])
    with torch.no_grad():
        log_probabilities = model(tokens[:, :-1]).logits.log_softmax(-1)
    expected = -log_probabilities.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(trace.token_losses, expected)
    assert trace_routes(model, tokens).token_losses is None


def test_the_model_computes_the_same_and_keeps_no_hook():
    model, tokens = lively_model(small_model_config()).eval(), token_batch()
    with torch.no_grad():
        before = model(tokens).logits
        with record_routes(model) as passes:
            during = model(tokens).logits
            model(tokens[:1, :5])
        after = model(tokens).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    assert [trace.operator.shape for trace in passes] == [(4, 3, 12), (4, 1, 5)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "three" not in name or "all" not in name])
def test_routes_that_generation_takes_are_those_of_the_whole_text(variant):
    model = lively_model(small_model_config(**VARIANTS[variant])).eval()
    with record_routes(model) as passes:
        new = generate(model, [3, 1, 4], 8, temperature=1.0, seed=3)
    whole = trace_routes(model, torch.tensor([[3, 1, 4, *new]]))
    assert [trace.operator.shape[2] for trace in passes] == [3] + [1] * 7
    operator = torch.cat([trace.operator for trace in passes], 2)
    assert torch.equal(operator, whole.operator[:, :, :-1])
    entropy = torch.cat([trace.entropy for trace in passes], 2)
    torch.testing.assert_close(entropy, whole.entropy[:, :, :-1])


def test_some_tokens_can_be_taken_out():
    model = lively_model(small_model_config(router=ROUTERS["hard"])).eval()
    tokens = token_batch(2, 9)
    trace = trace_routes(model, tokens[:, :-1], tokens[:, 1:])
    part = trace.tokens(slice(2, 5))
    for name in ("operator", "entropy", "gates"):
        assert torch.equal(getattr(part, name)[1], getattr(trace, name)[1][:, 2:5]), name
    for name in ("meta_gate", "token_losses"):
        assert torch.equal(getattr(part, name), getattr(trace, name)[:, 2:5]), name
