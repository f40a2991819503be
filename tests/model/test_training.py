"""What training needs of the model: gradients everywhere, 16-bit weights, real skipping, a regulariser that acts."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from model_cases import ROUTERS, THREE, VARIANTS, lively_model, small_model_config, token_batch
from torch import nn

from megachiar.model import build_model
from megachiar.model.attention import SelfAttention
from megachiar.model.dct_mixing import DctMixing
from megachiar.model.feed_forward import FeedForward
from megachiar.model.rbf_mixing import RbfMixing

SATURATED = {
    "saturated low": {"tau": 0.0, "collapse_weight": 0.1},
    "saturated high": {"tau": 1.0, "collapse_weight": 0.1},
    "saturated three": {"operators": THREE, "tau_low": 0.0, "tau_high": 1.0, "collapse_weight": 0.1},
}
EVERY = VARIANTS | {name: {"router": router} for name, router in SATURATED.items()}


def train_once(model, tokens: torch.Tensor):
    output = model(tokens[:, :-1], tokens[:, 1:])
    (output.loss + output.regulariser).backward()
    return output


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("variant", EVERY)
def test_every_parameter_gets_a_finite_gradient(variant, dtype):
    """Zero, not None, where an operator had no token: ranks must reduce the same parameters."""
    model = build_model(small_model_config(**EVERY[variant], dropout=0.1), seed=0, dtype=dtype)
    train_once(model, token_batch())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == dtype


# 16-bit weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_16_bit_weights_come_near_fp32(variant, dtype):
    config = small_model_config(**VARIANTS[variant])
    small = lively_model(config, dtype=dtype)
    wide = lively_model(config, dtype=torch.float32)
    wide.load_state_dict({name: value.float() for name, value in small.state_dict().items()})
    tokens = token_batch(8, 17)
    losses = [train_once(model, tokens) for model in (small, wide)]
    assert losses[0].loss.dtype == torch.float32 and losses[0].token_losses.dtype == torch.float32
    assert losses[0].loss.item() == pytest.approx(losses[1].loss.item(), rel=0.02)
    assert losses[0].statistics.attention_share.dtype == torch.float32
    if "random" in variant or variant == "baseline":  # the others may flip a token near the threshold
        for (name, got), expected in zip(small.named_parameters(), wide.parameters(), strict=True):
            if expected.grad.norm() > 1e-4:
                error = (got.grad.float() - expected.grad).norm() / expected.grad.norm()
                assert error < (0.1 if dtype == torch.bfloat16 else 0.02), f"{name}: {error:.3f}"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_entropy_is_computed_in_fp32_whatever_the_weights(dtype):
    """bf16 has 8 bits: H in [0.5, 1) would be a multiple of 1/256, and the published thresholds are 0.0038 apart."""
    model = build_model(small_model_config(hidden_size=128, router={"tau": 0.85}), seed=0).to(dtype)
    seen = []
    model.layers[1].router.register_forward_hook(lambda _, inputs, decision: seen.append((inputs[0], decision)))
    model(token_batch(4, 16))
    (rows, decision), *_ = seen
    assert rows.dtype == dtype and decision.entropy.dtype == decision.spectrum.dtype == torch.float32
    matrix = torch.cos(math.pi / 128 * (torch.arange(128).double() + 0.5) * torch.arange(128).double()[:, None])
    matrix[0] /= math.sqrt(2)
    power = (rows.double() @ matrix.T).square()
    p = power / power.sum(-1, keepdim=True)
    expected = -(p * p.log()).sum(-1) / math.log(128)
    torch.testing.assert_close(decision.entropy.double(), expected, rtol=0, atol=1e-6)


def test_no_constant_table_is_a_buffer_that_a_cast_would_round():
    config = small_model_config(router=ROUTERS["threshold three"])
    names = {name.rsplit(".", 1)[-1] for name, _ in build_model(config, seed=0).named_buffers()}
    assert names == {"frequencies"}, "drawn numbers of RBF mixing, cast like any weight"


# Skipping ------------------------------------------------------------------------------------------------------------


class RowCounter:
    """Counts the rows that enter each part of a model."""

    def __init__(self, model: nn.Module):
        self.rows: dict[str, int] = defaultdict(int)
        for name, module in model.named_modules():
            if isinstance(module, SelfAttention):
                for part in ("query", "key_value", "output"):
                    self._watch(getattr(module, part), f"{name}.{part}")
            elif isinstance(module, RbfMixing):
                self._watch(module.output, f"{name}.output")
            elif isinstance(module, (DctMixing, FeedForward)):
                self._watch(module, name)

    def _watch(self, module: nn.Module, name: str) -> None:
        def count(_module, inputs):
            self.rows[name] += len(inputs[0])

        module.register_forward_pre_hook(count)


@pytest.mark.parametrize("router", [name for name in ROUTERS if not name.startswith("soft")])
def test_each_operator_computes_its_own_rows_alone(router):
    model = lively_model(small_model_config(router=ROUTERS[router]))
    counter, tokens = RowCounter(model), token_batch(4, 12)
    with torch.no_grad():  # the gates of a hard router learn from what is not taken, too
        statistics = model(tokens).statistics
    n = tokens.numel()
    for layer in (1, 2):
        attention = round(statistics.attention_share[layer].item() * n)
        rbf = round(statistics.rbf_share[layer].item() * n)
        name = f"layers.{layer}"
        assert counter.rows[f"{name}.attention.query"] == counter.rows[f"{name}.attention.output"] == attention
        assert counter.rows[f"{name}.dct"] == n - attention - rbf
        assert counter.rows[f"{name}.attention.key_value"] == counter.rows[f"{name}.feed_forward"] == n
        if "rbf" in model.config.router.operators:
            assert counter.rows[f"{name}.rbf.output"] == rbf
    if router == "threshold":
        assert 0 < counter.rows["layers.1.attention.query"] < n
    assert counter.rows["layers.0.operator"] == counter.rows["layers.3.operator.query"] == n


# Collapse regulariser ------------------------------------------------------------------------------------------------


REGULARISED = ("threshold regularised", "threshold three regularised", "soft three", "hard three")


@pytest.mark.parametrize("router", REGULARISED)
def test_gradient_of_the_regulariser_against_finite_differences(router):
    # One routed layer: through two, the hard router's straight-through gradient is not that of its values.
    config = small_model_config(num_layers=3, router=ROUTERS[router] | {"collapse_temperature": 0.05})
    model, tokens = lively_model(config), token_batch()
    model(tokens).regulariser.backward()
    generator = torch.Generator().manual_seed(4)
    parameters = list(model.parameters())
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    moving = [(p.grad, d) for p, d in zip(parameters, directions, strict=True) if p.grad is not None]
    slope = sum((gradient * d).sum() for gradient, d in moving).item()

    @torch.no_grad()
    def moved(step: float) -> float:
        for p, d in zip(parameters, directions, strict=True):
            p += step * d
        value = model(tokens).regulariser.item()
        for p, d in zip(parameters, directions, strict=True):
            p -= step * d
        return value

    step = 1e-6
    assert abs(slope) > 1e-3
    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(slope, rel=1e-4)


COLLAPSED = ({"kind": "soft"}, {"kind": "hard"}, {"tau": 0.85, "collapse_temperature": 0.02})


@pytest.mark.parametrize("router", COLLAPSED, ids=str)
def test_the_regulariser_draws_the_use_of_operators_together(router):
    """From a start where nearly all rows take one operator, it alone must bring the shares nearer to one half."""
    model = lively_model(small_model_config(router=router | {"collapse_weight": 1.0}), dtype=torch.float32)
    with torch.no_grad():
        for layer in model.layers[1:3]:
            if hasattr(layer.router, "gate"):
                layer.router.gate.bias += torch.tensor([3.0, 0.0])
    tokens = token_batch(8, 16)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    before = model(tokens)
    for _ in range(40):
        optimizer.zero_grad()
        model(tokens).regulariser.backward()
        optimizer.step()
    after = model(tokens)
    assert after.regulariser < before.regulariser - 0.1

    def distance(output):
        return (output.statistics.attention_share[1:3] - 0.5).abs().max().item()

    assert distance(after) < distance(before) - 0.1


def test_the_regulariser_is_least_where_all_operators_are_used_alike():
    config = small_model_config(router={"kind": "soft", "collapse_weight": 0.25})
    model = build_model(config, seed=0, dtype=torch.float64)
    for layer in model.layers[1:3]:
        nn.init.zeros_(layer.router.gate.weight)
    assert model(token_batch()).regulariser.item() == pytest.approx(-2 * 0.25 * math.log(2), rel=1e-12)


# Learning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_few_steps_learn_a_text_by_heart(variant):
    model = build_model(small_model_config(**VARIANTS[variant]), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = token_batch(2, 13)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(train_once(model, tokens).loss.item())
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(31), rel=0.1)
    assert min(losses) < 1.0
