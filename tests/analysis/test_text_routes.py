"""What is said of the routes of a text is true of its tokens, and a long text is read in windows that overlap."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from model_cases import ROUTERS, THREE, VARIANTS, lively_model, small_model_config
from routed_runs import TEXT, VOCABULARY, described_routes, record_of

from megachiar.analysis.route_trace import trace_routes
from megachiar.analysis.text_routes import noise_of, text_routes, windows_of
from megachiar.viewer.words import how_it_routes, with_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.mark.parametrize("longest", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17, 40, 41])
def test_windows_keep_each_token_once_and_leave_half_a_window_before_it(tokens, longest):
    windows = windows_of(tokens, longest)
    assert [place for window in windows for place in range(window.kept, window.stop)] == list(range(tokens))
    for window in windows:
        assert window.stop - window.start <= longest and window.kept < window.stop
        assert window.start == 0 or window.kept - window.start == longest - max(1, longest // 2)


@pytest.mark.parametrize("variant", ["baseline", "threshold three", "soft", "random"])
def test_a_long_text_has_the_routes_and_losses_of_its_windows(folder, variant):
    config = small_model_config(vocab_size=VOCABULARY, **VARIANTS[variant])
    model = lively_model(config, dtype=torch.float32).eval()
    routes, _, tokenizer = described_routes(folder, TEXT * 2, **VARIANTS[variant])
    ids = [int(token) for token in tokenizer.encode(TEXT * 2)]
    assert list(routes.tokens) == ids and len(routes.windows) > 5
    for start, kept, stop in routes.windows:
        window = torch.tensor([ids[start:stop]])
        trace = trace_routes(model, window)
        assert torch.equal(trace.operator[:, 0, kept - start :], routes.trace.operator[:, 0, kept:stop])
        torch.testing.assert_close(trace.entropy[:, 0, kept - start :], routes.trace.entropy[:, 0, kept:stop])
        with torch.no_grad():
            log_probabilities = model(window).logits[0].log_softmax(-1)
        for place in range(max(kept, 1), stop):
            expected = -log_probabilities[place - 1 - start, ids[place]].item()
            assert routes.losses[place] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(routes.losses[0]) and np.isfinite(routes.losses[1:]).all()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "soft" not in name])
def test_shares_and_means_are_those_of_the_tokens(folder, variant):
    routes, config, _ = described_routes(folder, **VARIANTS[variant])
    record = json.loads(json.dumps(record_of(routes, config), allow_nan=False))
    tokens, names = record["tokens"], record["operators"]
    for index, layer in enumerate(record["layers"]):
        taken = Counter(names[token["operator"][index]] for token in tokens)
        assert layer["shares"] == pytest.approx({name: taken[name] / len(tokens) for name in names})
        mean = sum(token["entropy"][index] for token in tokens) / len(tokens)
        assert layer["entropy_mean"] == pytest.approx(mean, abs=1e-6)
        assert layer["routed"] == (index in config.routed_layers)
    for each in record["classes"][:-1]:
        of_class = [token for token in tokens if token["class"] == each["class"]]
        assert each["tokens"] == len(of_class) > 0
        for index, shares in enumerate(each["shares"]):
            taken = Counter(names[token["operator"][index]] for token in of_class)
            assert shares == pytest.approx({name: taken[name] / len(of_class) for name in names})
    assert sum(each["tokens"] for each in record["classes"][:-1]) == len(tokens)
    led = record["classes"][-1]
    assert led["class"] == "led by white space"
    assert led["tokens"] == sum(token["text"][:1].isspace() for token in tokens)
    losses = [token["loss"] for token in tokens if token["loss"] is not None]
    assert record["mean_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_shares_of_a_soft_router_are_its_mean_gates(folder):
    routes, config, _ = described_routes(folder, router=ROUTERS["soft three"])
    record = record_of(routes, config)
    for index in (1, 2):
        mean = np.mean([token["gates"][index] for token in record["tokens"]], 0)
        assert record["layers"][index]["shares"] == pytest.approx(dict(zip(THREE, mean, strict=True)))
    assert record["layers"][0]["shares"] == {"dct": 1, "rbf": 0, "attention": 0}
    assert record["tokens"][0]["gates"][0] is record["tokens"][0]["gates"][3] is None


@pytest.mark.parametrize("tau", [None, (0.78, 0.8)])
def test_a_running_threshold_is_shown_where_it_is_now(folder, tau):
    """Not where it started: tokens are divided by the number that is shown."""
    router = {"tau": tau, "target_share": 0.4}
    model = lively_model(small_model_config(vocab_size=VOCABULARY, router=router), dtype=torch.float32).eval()
    for layer, bound in ((1, 0.75), (2, 0.81)):
        model.layers[layer].router.set_thresholds((bound,))
    _, config, tokenizer = described_routes(folder, router=router)
    record = text_routes(model, tokenizer, [int(token) for token in tokenizer.encode(TEXT)]).as_dict(config)
    assert [layer["bounds"] for layer in record["layers"]] == [[], [0.75], [pytest.approx(0.81)], []]
    taken = {token["operator"][1] for token in record["tokens"]}
    assert taken == {0, 1}
    assert all((token["entropy"][1] > 0.75) == (token["operator"][1] == 1) for token in record["tokens"])
    assert "threshold 0.7500" in how_it_routes(record, record["layers"][1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_router_is_put_in_words(folder, variant):
    routes, config, _ = described_routes(folder, **VARIANTS[variant])
    record = record_of(routes, config)
    assert all(layer["how"] for layer in with_words(record)["layers"])


def test_bounds_are_those_of_each_layer(folder):
    routes, config, _ = described_routes(folder, router=ROUTERS["threshold per layer"])
    assert [layer["bounds"] for layer in record_of(routes, config)["layers"]] == [[], [0.74], [0.83], []]
    routes, config, _ = described_routes(folder, router=ROUTERS["threshold three"])
    assert [layer["bounds"] for layer in record_of(routes, config)["layers"]] == [[], [0.77, 0.82], [0.77, 0.82], []]
    routes, config, _ = described_routes(folder, router=ROUTERS["random"])
    assert [layer["bounds"] for layer in record_of(routes, config)["layers"]] == [[], [], [], []]


def test_fewer_tokens_in_attention_save_more_flops_and_a_soft_router_saves_none(folder):
    saved = {
        name: record_of(*described_routes(folder, **VARIANTS[name])[:2])["flops_saved"]
        for name in ("baseline", "threshold all attention", "threshold", "threshold all dct", "soft")
    }
    assert saved["baseline"] == {"operators": 0, "model": 0}
    for part in ("operators", "model"):
        less, middle, more = (saved[name][part] for name in list(saved)[1:4])
        assert less < middle < more
    assert saved["soft"]["operators"] < saved["threshold all attention"]["operators"]
    assert all(each["model"] <= each["operators"] for each in saved.values() if each["operators"] > 0)


def test_noise_is_sampled_where_the_formula_does_not_hold():
    plain = noise_of(small_model_config(hidden_size=64))
    rows = np.random.default_rng(1).standard_normal((20_000, 64))
    for weight in (1.0, 2.0):
        power = rows**2 * np.where(np.arange(64) == 0, weight, 1)  # the DCT of white noise is white noise
        p = power / power.sum(1, keepdims=True)
        entropy = -(p * np.log(p)).sum(1) / np.log(64)
        found = noise_of(small_model_config(hidden_size=64, dct={"entropy_dc_weight": weight}))
        assert found["mean"] == pytest.approx(entropy.mean(), abs=1e-3)
        assert found["deviation"] == pytest.approx(entropy.std(), rel=0.05)
    assert noise_of(small_model_config(hidden_size=64, dct={"entropy_dc_weight": 2.0})) != plain


def test_one_token_is_a_text(folder):
    config = small_model_config(vocab_size=VOCABULARY)
    model = lively_model(config, dtype=torch.float32).eval()
    tokenizer = described_routes(folder)[2]
    record = record_of(text_routes(model, tokenizer, [7]), config)
    assert len(record["tokens"]) == 1 and record["mean_loss"] is None
    json.dumps(record, allow_nan=False)
