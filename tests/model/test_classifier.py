"""Classification heads: the mean of real hidden states, whatever padding follows, with plain torch as oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_cases import small_model_config

from megachiar.config.tasks import HeadConfig
from megachiar.model import build_model

LENGTHS = [3, 12, 1, 7]
LABELS = torch.tensor([2, 0, 1, -100])
CASES = {
    "threshold": {},
    "soft": {"router": {"kind": "soft"}},
    "pre": {"norm": "pre", "dropout": 0.0},
    "batch": {"meta_router": {"pool": "batch"}},
    "rbf": {"router": {"tau_low": 0.77, "tau_high": 0.82, "operators": ("dct", "rbf", "attention")}},
}


def model_of(name: str, padding: str = "masked", head: str = "linear"):
    config = small_model_config(**CASES[name])
    heads = {"first": HeadConfig(3, head, padding), "second": HeadConfig(5, "linear", "masked")}
    model = build_model(config, seed=3, dtype=torch.float64, heads=heads)
    for parameter in model.classifiers.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return model


def examples(longest: int = 12) -> torch.Tensor:
    tokens = torch.randint(0, 31, (len(LENGTHS), longest), generator=torch.Generator().manual_seed(4))
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[length:] = -1
    return tokens


def alone(model, tokens: torch.Tensor, head: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits (B, C) of each example computed by itself, without padding, and its hidden states (T, d)."""
    logits, states = [], []
    for row in tokens:
        kept: list[torch.Tensor] = []
        handle = model.norm.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        model(row[row >= 0][None])
        handle.remove()
        layers = model.classifiers[head]
        mean = kept[0].mean(0)
        if hasattr(layers, "hidden"):
            mean = F.gelu(F.linear(mean, layers.hidden.weight, layers.hidden.bias))
        logits.append(F.linear(mean, layers.output.weight, layers.output.bias))
        states.append(kept[0])
    return torch.stack(logits), states


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "batch"])
def test_padding_changes_nothing(name, head):
    model, tokens = model_of(name, head=head).eval(), examples()
    output = model(tokens, LABELS, head="first")
    expected, _ = alone(model, tokens, "first")
    torch.testing.assert_close(output.logits, expected, rtol=1e-10, atol=1e-12)
    assert output.loss.item() == pytest.approx(F.cross_entropy(expected[:3], LABELS[:3]).item(), rel=1e-10)
    assert output.token_losses[3] == 0


def test_more_padding_changes_nothing_with_a_gate_over_the_batch():
    model, tokens = model_of("batch").eval(), examples()
    more = F.pad(tokens, (0, 4), value=-1)
    one, other = model(tokens, LABELS, head="first"), model(more, LABELS, head="first")
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(one.statistics.gate[0], other.statistics.gate[0], rtol=1e-6)


def test_counted_padding_is_token_0():
    model, tokens = model_of("threshold", padding="counted").eval(), examples()
    expected, _ = alone(model, tokens.clamp_min(0), "first")
    torch.testing.assert_close(model(tokens, head="first").logits, expected, rtol=1e-10, atol=1e-12)
    other = model_of("threshold").eval()
    assert not torch.allclose(other(tokens, head="first").logits, expected)


@pytest.mark.parametrize("name", ["threshold", "soft", "rbf"])
def test_statistics_leave_out_padding(name):
    model, tokens = model_of(name).eval(), examples()
    statistics = model(tokens, head="first").statistics
    weights = np.array(LENGTHS) / sum(LENGTHS)
    each = [model(row[row >= 0][None]).statistics for row in tokens]
    for field in ("attention_share", "rbf_share", "entropy", "gate"):
        expected = sum(w * getattr(s, field).numpy() for w, s in zip(weights, each, strict=True))
        np.testing.assert_allclose(getattr(statistics, field).numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=field)


def test_the_regulariser_leaves_out_padding():
    config = {"router": {"tau": 0.79, "collapse_weight": 0.7}}
    model = build_model(
        small_model_config(**config), seed=3, dtype=torch.float64, heads={"first": HeadConfig(3, "linear", "masked")}
    )
    tokens = examples()
    one = model(tokens, LABELS, head="first").regulariser.item()
    other = model(F.pad(tokens, (0, 9), value=-1), LABELS, head="first").regulariser.item()
    assert one == pytest.approx(other, rel=1e-9)
    assert one != pytest.approx(model(tokens.clamp_min(0)).regulariser.item(), rel=1e-3)


def test_gradients_agree_with_finite_differences():
    model, tokens = model_of("threshold", head="mlp").train(), examples()
    loss = model(tokens, LABELS, head="first").loss
    loss.backward()
    generator = torch.Generator().manual_seed(1)
    for name in ("classifiers.first.hidden.weight", "classifiers.first.output.bias", "norm.weight", "embedding.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum().item()
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(model(tokens, LABELS, head="first").loss.item())
                parameter.add_(direction, alpha=-step)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-9), name


def test_every_head_has_a_gradient_whichever_is_used():
    model = model_of("threshold").train()
    model(torch.randint(0, 31, (2, 12)), torch.randint(0, 31, (2, 12))).loss.backward()
    for name, parameter in model.classifiers.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


def test_a_head_does_not_change_the_other_initial_weights():
    config = small_model_config()
    plain, headed = (
        build_model(config, seed=3),
        build_model(config, seed=3, heads={"a": HeadConfig(3, "mlp", "masked")}),
    )
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, headed.get_parameter(name)), name
