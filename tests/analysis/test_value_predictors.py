"""Predictors of the value of a route: what is collected, how it is fitted, and that no token is judged on itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
import torch.nn.functional as F
from model_cases import ROUTERS, lively_model, small_model_config, token_batch
from model_oracle import Oracle

from megachiar.analysis import value_predictors
from megachiar.analysis.routed_tokens import collect_routes
from megachiar.analysis.value_predictors import (
    CHANGE,
    ENTROPY,
    FOCUS,
    NORM,
    PROBE,
    TIME_ENTROPY,
    TOKEN,
    PredictorInputs,
    attention_entropy,
    collect_inputs,
    mean_in_tenths,
    mean_of_ids,
    predictions,
    ridge,
    time_entropy,
)
from megachiar.analysis.windows import Windows


class BlendedOracle(Oracle):
    """The oracle with weights (B, T) of attention in its routed layers, by the index of the layer."""

    def __init__(self, model, weights: dict[int, torch.Tensor]):
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        super().__init__(model.config, {name: tensor.detach() for name, tensor in held.items()})
        self.weights = weights
        self.rows: dict[int, torch.Tensor] = {}

    def routed(self, x, index, result):
        self.rows[index] = x
        weight = self.weights[index][..., None]
        name = f"layers.{index}"
        y = weight * self.attention(x, f"{name}.attention") + (1 - weight) * self.dct(x, f"{name}.dct")
        return self.feed_forward(y, name)


@pytest.mark.parametrize(
    "fields", [{}, {"norm": "pre"}, {"router": ROUTERS["learned"]}], ids=["post", "pre", "learned"]
)
def test_values_to_first_order_are_slopes_of_the_oracles_loss(fields):
    """The oracle moves one token a little from one operator to the other and back; it knows no gradient."""
    model = lively_model(small_model_config(**{"router": ROUTERS["threshold"]} | fields)).eval()
    tokens = token_batch(3, 13)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 4] = -100
    windows = Windows(inputs.numpy(), targets.numpy(), np.arange(3))
    routed = collect_routes(model, windows, batch_size=2)
    wanted = np.array([[0, 3], [2, 11]])
    found = collect_inputs(model, windows, batch_size=2, wanted=wanted, seed=0)
    routes = {index: torch.from_numpy(routed.operator[index - 1]).double() for index in (1, 2)}
    for place, of_layer in enumerate(found):
        assert math.isnan(of_layer.values[1, 4])
        for sequence, position in ((0, 3), (0, 0), (1, 7), (2, 11)):
            losses = []
            for step in (1e-5, -1e-5):
                moved = {index: weights.clone() for index, weights in routes.items()}
                moved[place + 1][sequence, position] += step
                logits = BlendedOracle(model, moved)(inputs).logits
                losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item())
            assert of_layer.values[sequence, position] == pytest.approx((losses[1] - losses[0]) / 2e-5, abs=1e-8)
    assert max(np.nanmax(np.abs(of_layer.values)) for of_layer in found) > 1e-2
    oracle = BlendedOracle(model, routes)
    oracle(inputs)
    for place, of_layer in enumerate(found):
        rows = oracle.rows[place + 1].detach().numpy()
        np.testing.assert_allclose(of_layer.numbers[NORM], np.linalg.norm(rows, axis=-1), rtol=1e-9)
        steps = np.diff(rows, axis=1, prepend=0)
        np.testing.assert_allclose(of_layer.numbers[CHANGE], np.linalg.norm(steps, axis=-1), rtol=1e-9)
        np.testing.assert_allclose(of_layer.numbers[ENTROPY], routed.entropy[place], rtol=1e-12)
        assert (FOCUS in of_layer.numbers) == (place == 1)
        kept = of_layer.tokens.tolist()
        assert len(kept) == 35 and wanted.tolist() == [token for token in kept if token in wanted.tolist()]
        for row, (sequence, position) in zip(of_layer.rows, kept, strict=True):
            x = rows[sequence, position]
            expected = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
            np.testing.assert_allclose(row[:-1], expected, atol=1e-5)
            assert row[-1] == pytest.approx(routed.entropy[place, sequence, position], abs=1e-6)


def test_h_along_time_is_that_of_a_transform_of_the_window():
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = time_entropy(x, 4)
    for b in range(2):
        for t in range(9):
            rows = np.stack([x[b, max(0, s)].numpy() for s in range(t - 3, t + 1)])
            power = (scipy.fft.dct(rows, axis=0, norm="ortho") ** 2).sum(1)
            share = power / power.sum()
            share = share[share > 1e-30]
            assert found[b, t].item() == pytest.approx(-(share * np.log(share)).sum() / math.log(4), abs=1e-12)
    assert time_entropy(torch.ones(1, 6, 3), 4).abs().max() < 1e-5


def test_entropy_of_attention_is_that_of_each_query_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    found = attention_entropy(q, k)
    assert found[0] == 0
    for t in range(1, 6):
        entropies = []
        for head in range(2):
            scores = np.array([q[head, t] @ k[head, s] / 2 for s in range(t + 1)])
            weights = np.exp(scores) / np.exp(scores).sum()
            entropies.append(-(weights * np.log(weights)).sum())
        assert found[t].item() == pytest.approx(np.mean(entropies) / math.log(t + 1), abs=1e-12)
    assert attention_entropy(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2))[1:].tolist() == pytest.approx([1.0] * 4)


def test_a_ridge_finds_a_line_in_noise_and_nothing_where_there_is_nothing():
    rng = np.random.default_rng(0)
    rows, wanted = rng.normal(3, 2, (2000, 20)), rng.normal(3, 2, (500, 20))
    weights = rng.normal(size=20)
    values = rows @ weights + rng.normal(0, 20, 2000)
    found = ridge(rows, values, wanted)
    assert np.corrcoef(found, wanted @ weights)[0, 1] > 0.9
    nothing = ridge(rows, rng.normal(5, 1, 2000), wanted)
    assert np.abs(nothing - 5).max() < 0.35 and nothing.std() < 0.1
    # With one penalty alone the formula is that of a library's least squares on rows with a penalty's rows below them.
    x = (rows - rows.mean(0)) / rows.std(0)
    below = np.sqrt(2000 * 10.0**2) * np.eye(20)
    solved = scipy.linalg.lstsq(np.vstack([x, below]), np.concatenate([values - values.mean(), np.zeros(20)]))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "linspace", lambda *_: np.array([2.0]))
        alone = ridge(rows, values, wanted)
    np.testing.assert_allclose(alone, values.mean() + (wanted - rows.mean(0)) / rows.std(0) @ solved, rtol=1e-9)


def test_means_of_tenths_and_of_ids():
    numbers = np.arange(100.0)
    values = np.where(numbers < 10, 7.0, np.where(numbers >= 90, -1.0, 0.0))
    assert mean_in_tenths(numbers, values, np.array([-5.0, 3.0, 50.0, 95.0, 1e9])).tolist() == [7, 7, 0, -1, -1]
    assert mean_in_tenths(np.zeros(5), np.arange(5.0), np.array([0.0, 1.0])).tolist() == [2, 2]
    found = mean_of_ids(np.array([0, 0, 2]), np.array([1.0, 3.0, 5.0]), np.array([0, 1, 2]), prior=1.0)
    assert found.tolist() == pytest.approx([7 / 3, 3, 4])


def inputs_of(rng: np.random.Generator, values: np.ndarray) -> PredictorInputs:
    tokens = np.stack(np.meshgrid(np.arange(20), np.arange(16), indexing="ij"), -1).reshape(-1, 2)
    numbers = {name: rng.normal(size=(20, 16)) for name in (ENTROPY, TIME_ENTROPY)}
    rows = rng.normal(size=(320, 4)).astype(np.float32)
    return PredictorInputs(values=values, numbers=numbers, rows=rows, tokens=tokens)


def test_no_token_is_predicted_from_its_own_sequence():
    rng = np.random.default_rng(1)
    ids, values = rng.integers(0, 6, (20, 16)), rng.normal(size=(20, 16))
    inputs = inputs_of(rng, values)
    wanted = np.array([[3, 0], [3, 9], [7, 2]])
    before = predictions(inputs, ids, wanted)
    values[3] += 100.0
    after = predictions(inputs, ids, wanted)
    assert set(before) == {ENTROPY, TIME_ENTROPY, TOKEN, PROBE}
    for name, predicted in before.items():
        np.testing.assert_array_equal(after[name][:2], predicted[:2])
    assert any(after[name][2] != predicted[2] for name, predicted in before.items())


@pytest.mark.parametrize("name", [ENTROPY, TOKEN, PROBE])
def test_each_predictor_finds_the_value_that_is_its_own(name):
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 6, (20, 16))
    inputs = inputs_of(rng, np.empty((20, 16)))
    signal = {
        ENTROPY: np.abs(inputs.numbers[ENTROPY]) - 0.8,  # no order of its own: both ends are worth more
        TOKEN: np.array([0.0, 2.0, -1.0, 0.5, 1.0, -2.0])[ids],
        PROBE: (inputs.rows[:, 0] - inputs.rows[:, 2]).reshape(20, 16),
    }[name]
    inputs.values[:] = signal + 0.5 * rng.normal(size=(20, 16))
    found = predictions(inputs, ids, inputs.tokens)
    agreement = {key: abs(np.corrcoef(predicted, signal.ravel())[0, 1]) for key, predicted in found.items()}
    assert agreement.pop(name) > 0.85
    assert max(agreement.values()) < 0.35


def test_only_so_many_rows_are_kept(monkeypatch):
    monkeypatch.setattr(value_predictors, "PROBE_TOKENS", 6)
    model = lively_model(small_model_config(router=ROUTERS["threshold"])).eval()
    tokens = token_batch(4, 13)
    windows = Windows(tokens[:, :-1].numpy(), tokens[:, 1:].numpy(), np.arange(4))
    wanted = np.array([[0, 0], [3, 11]])
    first, second = (collect_inputs(model, windows, size, wanted, 3)[0] for size in (1, 4))
    assert 6 <= len(first.tokens) <= 8 and first.tokens[[0, -1]].tolist() == wanted.tolist()
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_allclose(first.rows, second.rows, atol=1e-6)


def test_predictors_keep_to_documents():
    """With a mask over documents what a predictor says of a document is what it says of the document alone."""
    model = lively_model(small_model_config(router=ROUTERS["threshold"])).eval()
    model.document_end = END
    document = token_batch(1, 8)[0].masked_fill(token_batch(1, 8)[0] == END, 5)
    other = token_batch(2, 6).masked_fill(token_batch(2, 6) == END, 5)
    both = torch.stack([torch.cat([first[:5], torch.tensor([END]), document]) for first in other])
    alone = collect(model, document[None])
    for place, of_layer in enumerate(collect(model, both)):
        for name in (TIME_ENTROPY, CHANGE, ENTROPY, *([FOCUS] if place else [])):
            for row in of_layer.numbers[name]:
                np.testing.assert_allclose(row[6:], alone[place].numbers[name][0], rtol=1e-7, atol=1e-12, err_msg=name)
        assert place == 0 or of_layer.numbers[FOCUS][0, 6] == 0


END = 1


def collect(model, tokens: torch.Tensor) -> list[PredictorInputs]:
    windows = Windows(tokens[:, :-1].numpy(), tokens[:, 1:].numpy(), np.arange(len(tokens)))
    return collect_inputs(model, windows, batch_size=2, wanted=np.array([[0, 3]]), seed=0)
