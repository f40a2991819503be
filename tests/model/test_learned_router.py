"""The learned router measures what attention is worth, held against finite differences, and learns where it helps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import small_model_config, token_batch

from megachiar.engine.running_routers import RunningRouters, ValueSums
from megachiar.model import ChiarFormer, build_model
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.layer import RoutedLayer

LEARNED = {"kind": "learned", "target_share": 0.5, "explore": 0.4}
LAYERS = (1, 2)
LENGTH = 16


def lively(**fields: Any) -> ChiarFormer:
    """Return an fp64 model whose parts all do something: weights far from their start."""
    model = build_model(small_model_config(router=LEARNED, **fields), seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.15)
        for index in LAYERS:  # half of the tokens attend
            with decisions_of(layer_of(model, index)) as seen:
                model(token_batch(2, LENGTH))
            layer_of(model, index).router.set_thresholds((seen[0].score.median().item(),))
    return model


def layer_of(model: ChiarFormer, index: int) -> RoutedLayer:
    layer = model.layers[index]
    assert isinstance(layer, RoutedLayer)
    return layer


@contextmanager
def decisions_of(layer: RoutedLayer, **fields: Any) -> Iterator[list[Any]]:
    """Keep the decisions of a layer's router, and let ``fields`` replace theirs."""
    seen: list[Any] = []

    def replace(_: Any, __: Any, decision: Any) -> Any:
        seen.append(decision)
        return dataclasses.replace(decision, **fields)

    handle = layer.router.register_forward_hook(replace)
    try:
        yield seen
    finally:
        handle.remove()


def measure_one(model: ChiarFormer, tokens: torch.Tensor, index: int, row: int, mean_square: float) -> tuple:
    """Return square and squared error of the value of one row, the gradient of the head's bias, and the decision."""
    head = layer_of(model, index).router.value_head
    assert head is not None
    head.mean_square.value.fill_(mean_square)
    explored = torch.zeros(tokens[:, :-1].numel(), dtype=torch.bool)
    explored[row] = True
    head.sums = None
    model.zero_grad()
    with decisions_of(layer_of(model, index), explored=explored) as seen:
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    assert head.sums is not None
    squares, errors, count = head.sums.tolist()
    assert count == 1 and head.bias.grad is not None
    return squares, errors, head.bias.grad.item(), seen[0]


def loss_along(model: ChiarFormer, tokens: torch.Tensor, index: int, row: int, part: float, routes: Any) -> float:
    """Return the summed loss if one row goes on with ``part`` more of attention's result and less of DCT mixing's."""
    layer, held = layer_of(model, index), {}
    handles = [
        layer.attention.register_forward_hook(lambda _, arguments, result: held.update(attention=(arguments, result))),
        layer.feed_forward.register_forward_pre_hook(
            lambda _, arguments: (_moved(layer, held, arguments[0], row, part), *arguments[1:])
        ),
    ]
    everything = torch.ones(tokens[:, :-1].numel(), dtype=torch.bool)
    try:
        with torch.no_grad(), decisions_of(layer, explored=everything, prediction=torch.zeros(len(everything))):
            return model(tokens[:, :-1], tokens[:, 1:], routes=dict(routes)).token_losses.sum().item()
    finally:
        for handle in handles:
            handle.remove()


def _moved(layer: RoutedLayer, held: dict, y: torch.Tensor, row: int, part: float) -> torch.Tensor:
    x, _, tokens, layout = held["attention"][0][:4]
    rows = dataclasses.replace(tokens, indices=torch.arange(len(x)), local_indices=torch.arange(len(x)))
    attended = layer.attention.forward(x, x, rows, layout, None)
    y = y.clone()
    y[row] += part * (attended - layer.dct.forward(x))[row]
    return y


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("index", LAYERS)
def test_a_value_is_the_slope_of_the_loss_between_both_results(index, norm):
    """By central differences of the loss, which know no gradient. The loss is a mean, and values are of its sum."""
    model, tokens = lively(norm=norm), token_batch(2, LENGTH + 1)
    with torch.no_grad():
        routes: dict[str, torch.Tensor] = {}
        model(tokens[:, :-1], tokens[:, 1:], routes=routes)
    seen = set()
    for row in (0, 5, 9, 13, 17, 22, 27):
        squares, errors, gradient, decision = measure_one(model, tokens, index, row, mean_square=0.25)
        ahead, behind = (loss_along(model, tokens, index, row, part, routes) for part in (1e-4, -1e-4))
        value = -(ahead - behind) / 2e-4
        assert squares == pytest.approx(value**2, rel=1e-5)
        error = 0.5 * decision.prediction[row].item() - value
        assert errors == pytest.approx(error**2, rel=1e-5)
        assert gradient == pytest.approx(error / (2 * LENGTH), rel=1e-5)  # as the loss is a mean over all rows
        seen.add(decision.operator[row].item())
    assert seen == {0, 1}, "rows of both routes"


def test_exploring_changes_nothing_but_the_head():
    tokens, results = token_batch(3, LENGTH + 1), []
    for explored in (False, True):
        model = lively()
        masks = {index: torch.full((3 * LENGTH,), explored) for index in LAYERS}
        for index in LAYERS:
            head = layer_of(model, index).router.value_head
            assert head is not None
            head.mean_square.value.fill_(1.0)
        with decisions_of(layer_of(model, 1), explored=masks[1]), decisions_of(layer_of(model, 2), explored=masks[2]):
            output = model(tokens[:, :-1], tokens[:, 1:])
            output.loss.backward()
        results.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain, without), (output, gradients) = results
    torch.testing.assert_close(output.token_losses, plain.token_losses, rtol=0, atol=1e-12)
    assert output.statistics.attention_share.tolist() == pytest.approx(plain.statistics.attention_share.tolist())
    assert len(set(output.statistics.attention_share[1:-1].tolist()) - {0.0, 1.0}) > 0
    for name, gradient in gradients.items():
        if "value_head" in name:
            assert gradient.abs().sum() > 0 and without[name].abs().sum() == 0
        else:
            torch.testing.assert_close(gradient, without[name], rtol=1e-9, atol=1e-12)


def test_explored_tokens_are_a_share_of_all_and_others_in_other_samples():
    model = lively()
    masks = []
    for first in (0, 64):
        tokens = token_batch(64, LENGTH + 1)
        with decisions_of(layer_of(model, 1)) as seen, decisions_of(layer_of(model, 2)) as later:
            model(tokens[:, :-1], tokens[:, 1:], torch.arange(first, first + 64))
        masks += [seen[0].explored, later[0].explored]
    for mask in masks:
        assert mask.double().mean().item() == pytest.approx(0.4, abs=4 * (0.24 / len(mask)) ** 0.5)
    for number, mask in enumerate(masks[1:], 1):
        both = (mask & masks[0]).double().mean().item()
        assert both == pytest.approx(0.16, abs=4 * (0.16 * 0.84 / len(mask)) ** 0.5), number
    with torch.no_grad(), decisions_of(layer_of(model, 1)) as seen:
        model(tokens[:, :-1], tokens[:, 1:])
    assert seen[0].explored is None


def sort_of_text(sequences: int, generator: torch.Generator) -> torch.Tensor:
    """Return tokens (B, T + 1) in which attention helps at some places only.

    Token 1 asks for the first token of its sequence, one of 2 to 9. Else the next token is noise, or 1.
    """
    tokens = torch.randint(10, 30, (sequences, LENGTH + 1), generator=generator)
    tokens[:, 0] = torch.randint(2, 10, (sequences,), generator=generator)
    asks = torch.rand(tokens.shape, generator=generator) < 0.25
    asks[:, 0] = False
    tokens[asks] = 1
    after = torch.roll(asks, 1, 1)
    after[:, 0] = False
    return torch.where(after, tokens[:, :1], tokens)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_learns_to_attend_where_attention_helps(seed):
    """Three in four of the tokens that ask attend, at a share of one third of all tokens. About a sixth of them ask."""
    router = {"kind": "learned", "target_share": 0.33, "explore": 0.5}
    config = small_model_config(router=router, num_layers=3, norm="pre", embedding_multiplier=50.0)
    model, generator = build_model(config, seed=seed), torch.Generator().manual_seed(seed)
    # The last layer attends always, and would do the work alone.
    torch.nn.init.zeros_(model.layers[2].operator.output.weight).requires_grad_(False)
    running, optimizer = RunningRouters(model, config), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        tokens = sort_of_text(32, generator)
        running.begin_step(1.0)
        optimizer.zero_grad()
        output = model(tokens[:, :-1], tokens[:, 1:])
        output.loss.backward()
        optimizer.step()
        sums = running.measure(torch.device("cpu"))
        running.follow(output.statistics.attention_share.tolist(), [ValueSums(*sums.tolist())])
    tokens = sort_of_text(64, generator)
    with torch.no_grad():
        share = model(tokens[:, :-1], tokens[:, 1:]).statistics.attention_share[1].item()
    attends = layer_of(model, 1).last_routes.view(64, LENGTH).bool()
    asks = tokens[:, :-1] == 1
    assert share == pytest.approx(0.33, abs=0.08)
    assert attends[asks].double().mean() > 0.75 > 0.5 > attends[~asks].double().mean()


@pytest.mark.parametrize("kind", ["threshold", "hashed", "learned"])
def test_a_running_threshold_finds_the_share(kind):
    """Of a stream of rows smoother than white noise: after 60 steps, the mean of 20 is within three deviations."""
    config = small_model_config(router={"kind": kind, "target_share": 0.2})
    model = build_model(config, seed=0)
    running, generator = RunningRouters(model, config), torch.Generator().manual_seed(0)
    router, shares = layer_of(model, 1).router, []
    for _ in range(80):
        noise = torch.randn(256, 33, generator=generator)
        rows = noise[:, 1:] + 0.5 * noise[:, :-1]
        with torch.no_grad():
            decision = router(rows, BatchLayout(16, 16))
        share = (decision.operator == 1).double().mean().item()
        running.follow([0.0, share, share, 1.0], [ValueSums()] * 2 if kind == "learned" else [])
        shares.append(share)
    assert np.mean(shares[60:]) == pytest.approx(0.2, abs=3 * (0.16 / 256 / 20) ** 0.5 + 0.01)


@pytest.mark.parametrize("kind", ["threshold", "learned"])
def test_an_annealed_share_falls_from_all_tokens_to_its_target(kind):
    config = small_model_config(router={"kind": kind, "target_share": 0.3, "anneal_steps": 200})
    model = build_model(config, seed=0)
    running, generator = RunningRouters(model, config), torch.Generator().manual_seed(0)
    router, shares = layer_of(model, 1).router, []
    for _ in range(280):
        with torch.no_grad():
            decision = router(torch.randn(256, 32, generator=generator), BatchLayout(16, 16))
        shares.append((decision.operator == 1).double().mean().item())
        running.follow([0.0, shares[-1], shares[-1], 1.0], [ValueSums()] * 2 if kind == "learned" else [])
    assert shares[0] == 1.0
    for middle, wanted in ((50, 0.825), (100, 0.65), (150, 0.475), (240, 0.3), (270, 0.3)):
        assert np.mean(shares[middle - 8 : middle + 8]) == pytest.approx(wanted, abs=0.05), middle


def test_the_share_of_a_coin_falls_on_a_line():
    """A coin's share is known: it follows no lag, and after the last step it is the coin of attention_share."""
    config = small_model_config(router={"kind": "random", "attention_share": 0.3, "anneal_steps": 20})
    model = build_model(config, seed=0)
    plain = build_model(small_model_config(router={"kind": "random", "attention_share": 0.3}), seed=0)
    running, router, shares = RunningRouters(model, config), layer_of(model, 1).router, []
    keys = torch.arange(20_000) * 0x9E3779B97F4A7C15 % 2**62
    x, layout = torch.zeros(20_000, 32), BatchLayout(1, 20_000)._replace(route_keys=keys)
    for _ in range(25):
        shares.append((router(x, layout).operator == 1).double().mean().item())
        running.follow([0.0, 0.0, 0.0, 1.0], [])
    assert shares[0] == 1.0
    assert shares[1:] == pytest.approx([max(0.3, 1 - 0.7 * step / 20) for step in range(1, 25)], abs=0.015)
    expected = layer_of(plain, 1).router(x, layout).operator
    assert (router(x, layout).operator == expected).double().mean() > 0.9999


def test_the_running_numbers_stay_exact_in_16_bits():
    model = build_model(small_model_config(router=LEARNED), seed=0)
    threshold = layer_of(model, 1).router.running_threshold
    assert threshold is not None
    threshold.value.fill_(0.123456789)
    before = threshold.value.clone()
    assert torch.equal(model.to(torch.bfloat16).double().layers[1].router.running_threshold.value, before)


def test_the_mean_square_is_that_of_the_first_step_and_then_follows():
    config = small_model_config(router=LEARNED)
    model = build_model(config, seed=0)
    running, head = RunningRouters(model, config), layer_of(model, 1).router.value_head
    assert head is not None
    for squares, expected in ((8.0, 2.0), (16.0, 2.04), (0.0, 1.9992)):
        running.follow([0.0, 0.5, 0.5, 1.0], [ValueSums(squares, 1.0, 4.0), ValueSums()])
        assert head.mean_square.value.item() == pytest.approx(expected, rel=1e-6)
    other = layer_of(model, 2).router.value_head
    assert other is not None and other.mean_square.value.item() == 0
