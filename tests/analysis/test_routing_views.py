"""What the report sees of routes: permuted channels, distances, classes of tokens, and models made to be known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from model_cases import ROUTERS, THREE, lively_model, small_model_config, token_batch

from megachiar.analysis.attention_distance import attention_distances, mean_distance
from megachiar.analysis.calibration import noise_entropies
from megachiar.analysis.permuted_channels import ChannelPermutations, agreement_over_permutations
from megachiar.analysis.resampling import Clusters
from megachiar.analysis.route_value import choose_tokens, route_values
from megachiar.analysis.routed_tokens import collect_routes
from megachiar.analysis.routing_analysis import SavedStep, Settings, Text, analyze_routing, verdicts
from megachiar.analysis.routing_findings import (
    Finding,
    channel_findings,
    distance_findings,
    entropy_findings,
    share_findings,
    stability_finding,
)
from megachiar.analysis.routing_worth import value_findings
from megachiar.analysis.token_features import (
    WORD_CLASSES,
    frequency_classes,
    position_classes,
    quantile_classes,
    word_class,
)
from megachiar.analysis.windows import Windows
from megachiar.data.tokenizers.token_reader import TokenText
from megachiar.model import ChiarFormer, build_model

VOCABULARY, D, T = 400, 64, 32


def zipf_windows(sequences: int, seed: int = 0) -> Windows:
    shares = 1 / np.arange(1, VOCABULARY + 1)
    ids = np.random.default_rng(seed).choice(VOCABULARY, (sequences, T + 1), p=shares / shares.sum())
    return Windows(ids[:, :-1], ids[:, 1:], np.arange(sequences))


def model_of_width(**fields) -> ChiarFormer:
    config = small_model_config(vocab_size=VOCABULARY, hidden_size=D, max_sequence_length=T, **fields)
    return build_model(config, seed=0).eval()


def white_rows(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, D, generator=torch.Generator().manual_seed(seed))


def report(model: ChiarFormer, windows: Windows, **more) -> list[Finding]:
    settings = {"switches": 0, "permutations": 8, "batch_size": 16, "seed": 0} | more.pop("settings", {})
    counts = np.bincount(windows.inputs.ravel(), minlength=VOCABULARY)
    text = Text(windows=windows, counts=counts, words=None)
    return analyze_routing(model, text, Settings(**settings), **more)


def pick(findings: list[Finding], measure: str, layer: int | None = 2) -> Finding:
    (found,) = (f for f in findings if f.measure == measure and f.layer == layer)
    return found


# Permuted channels ---------------------------------------------------------------------------------------------------


def test_agreement_and_chance_of_four_tokens_by_hand():
    routes = np.array([1, 1, 0, 0])
    permuted = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]])
    found = agreement_over_permutations(routes, permuted)
    assert found.agreement == pytest.approx(np.mean([0.75, 0.75, 0, 1]))
    assert found.chance == pytest.approx(0.5)  # the routes take each operator half the time
    assert found.beyond_chance.value == pytest.approx(np.mean([0.5, 0.5, -1, 1]))
    assert found.spread == pytest.approx(np.std([0.75, 0.75, 0, 1], ddof=1))


def test_routes_of_permuted_channels_are_those_of_a_model_with_permuted_rows():
    """The routed layer's input is permuted by hand, and the decision is that of its own router."""
    model = lively_model(small_model_config(router=ROUTERS["threshold"])).eval()
    tokens = token_batch(3, 13)
    windows = Windows(tokens[:, :-1].numpy(), tokens[:, 1:].numpy(), np.arange(3))
    permute = ChannelPermutations(model, 2, seed=4)
    found = permute(windows, 2, lambda count: None)
    assert found.shape == (2, 2, 3, 12)
    inputs = []
    hook = model.layers[1].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
    with torch.no_grad():
        model(tokens[:, :-1])
    hook.remove()
    rows = inputs[0][0].numpy()
    for place, order in enumerate(permute.orders):
        power = scipy.fft.dct(rows[:, order.numpy()], norm="ortho") ** 2
        h = scipy.stats.entropy(power, axis=-1) / math.log(rows.shape[1])
        assert (found[0, place].ravel() == (h > model.layers[1].router.thresholds()[0])).all()


def test_a_random_router_does_not_see_the_channels_and_a_hash_sees_nothing_else():
    windows = zipf_windows(24)
    blind = report(model_of_width(router={"kind": "random", "attention_share": 0.4}), windows)
    assert pick(blind, "agreement beyond chance").value == pytest.approx(1.0)
    assert "does not matter" in pick(blind, "agreement beyond chance").verdict
    model = model_of_width(router={"tau": 0.823})
    with torch.no_grad():
        model.embedding.weight.copy_(0.02 * white_rows(1))
    hashed = pick(report(model, windows), "agreement beyond chance")
    assert hashed.low < 0.1 and hashed.high < 0.4 and "hash" in hashed.verdict


def test_routes_that_read_the_numbers_of_a_row_in_any_order_agree():
    """One large channel among small ones has a flatter spectrum than white noise, wherever it stands."""
    model = model_of_width(router={"tau": 0.88})
    rows = white_rows(2)
    rows[::2] *= 0.01
    rows[::2, 5] = 1.0
    with torch.no_grad():
        model.embedding.weight.copy_(rows)
    found = pick(report(model, zipf_windows(24)), "agreement beyond chance")
    assert found.value > 0.95 and "does not matter" in found.verdict


# Models made to be known ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_white_noise_is_told_from_smooth_embeddings_in_95_of_100_models(models):
    windows, model = zipf_windows(32), model_of_width(router={"tau": 0.82})
    clusters = Clusters(np.repeat(np.arange(32), T), windows.inputs.ravel())
    noise, called = noise_entropies(model.config), []
    for seed in range(models):
        white = white_rows(seed)
        for rows in (white, white + 0.3 * white.cumsum(-1)):
            with torch.no_grad():
                model.embedding.weight.copy_(0.02 * rows)
            routed = collect_routes(model, windows, batch_size=64)
            found = entropy_findings(2, routed.entropy[0].ravel(), noise, clusters)
            called.append("like white noise" in found[0].verdict and "unlike" not in found[0].verdict)
    assert sum(called[::2]) >= 0.95 * models - 1 and sum(called[1::2]) <= 0.05 * models
    assert models < 100 or sum(called[::2]) >= 95


def test_routes_that_are_a_function_of_the_token_id_are_called_one():
    """Even ids have smooth rows and odd ids white ones: H, and with it the route, is a function of the id."""
    model = model_of_width(router={"tau": 0.6}, meta_router={"pool": "none"})
    rows = white_rows(5)
    rows[::2] = rows[::2].cumsum(-1).cumsum(-1)
    with torch.no_grad():
        model.embedding.weight.copy_(rows)
    windows = zipf_windows(32)
    findings = report(model, windows)
    by_id = pick(findings, "route explained by token id")
    assert by_id.value > 0.95 and by_id.verdict == "decides the route"
    share = (windows.inputs % 2 == 1).mean()
    assert pick(findings, "share of attention").value == pytest.approx(share, abs=0.05)
    assert pick(findings, "likeness of H within a token id").value > 0.95
    assert "no more than" in pick(findings, "route explained by position").verdict
    assert "unlike white noise" in verdicts(findings)[2] and "token id explains" in verdicts(findings)[2]


def test_a_router_that_sends_all_tokens_one_way_has_collapsed():
    findings = report(model_of_width(router={"tau": 0.0}), zipf_windows(8), settings={"switches": 16})
    assert "takes nearly every token" in pick(findings, "share of attention").verdict
    assert "hardly a token" in pick(findings, "share of dct").verdict
    for measure in ("agreement beyond chance", "route explained by token id", "regret (0 the oracle, 1 a coin)"):
        assert math.isnan(pick(findings, measure).value)
        assert "one operator takes all tokens" in pick(findings, measure).verdict
    assert pick(findings, "attention for all: loss, nats a token", None).value == 0
    assert "collapsed" in verdicts(findings)[2]
    dct = share_findings(2, np.zeros(100, int), THREE, Clusters(np.repeat(np.arange(10), 10), np.arange(100)), 0)
    assert [f.verdict.partition(":")[0] for f in dct] == ["collapsed", "collapsed", "collapsed"]


@pytest.mark.parametrize("router", ("threshold", "threshold three", "hard", "soft", "random", "hashed"))
def test_every_router_has_a_report_that_repeats_itself(router):
    model = model_of_width(router=ROUTERS[router])
    windows = zipf_windows(8)
    first, again = (report(model, windows, settings={"switches": 12}) for _ in range(2))
    assert [f.as_dict() for f in first] == [f.as_dict() for f in again]
    sections = {f.section for f in first}
    assert {"shares", "entropy", "channels", "information", "loss"} <= sections
    assert ({"value", "other routes"} <= sections) == (router != "soft")
    assert all(f.verdict for f in first) and {f.layer for f in first} >= {2, 3}


def test_a_router_that_knows_the_value_has_a_small_regret():
    """The routes are set to the measured values' signs, and measured again: values change little by other switches."""
    model = model_of_width(router={"tau": 0.823}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    windows = zipf_windows(12)
    routed = collect_routes(model, windows, 12)
    tokens = choose_tokens(windows.targets, 60, seed=0)
    values = route_values(model, routed, windows.targets, tokens, 32)[0]
    knowing = dataclasses.replace(values, operator=(values.value > np.median(values.value)).astype(int))
    ignorant = dataclasses.replace(values, operator=np.random.default_rng(0).permutation(knowing.operator))
    inverse = dataclasses.replace(values, operator=1 - knowing.operator)
    measures = {}
    for name, changed in (("knowing", knowing), ("ignorant", ignorant), ("inverse", inverse)):
        found = value_findings(changed, 1, routed.ids, True, 0)
        measures[name] = pick(found, "regret (0 the oracle, 1 a coin)")
    assert measures["knowing"].value == pytest.approx(0.0) and "knows something" in measures["knowing"].verdict
    assert "no better than a coin" in measures["ignorant"].verdict
    assert measures["inverse"].value > 1.3 and "worse" in measures["inverse"].verdict


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_agreement_of_two_checkpoints_beyond_chance_by_hand():
    before = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0] * 20)
    after = np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 0] * 20)
    clusters = Clusters(np.repeat(np.arange(20), 10), np.arange(200))
    found = stability_finding(2, (10, 20), before, after, clusters, 0)
    chance = 0.3**2 + 0.7**2
    assert found.value == pytest.approx((0.8 - chance) / (1 - chance)) and found.details["agreement"] == 0.8
    assert "step 10 to 20" in found.measure and "some routes move" in found.verdict


def test_a_run_whose_routes_are_drawn_anew_is_told_from_one_that_keeps_them():
    windows = zipf_windows(24)
    models = []
    for seed in (1, 2):
        models.append(model_of_width(router={"tau": 0.823}))
        with torch.no_grad():
            models[-1].embedding.weight.copy_(0.02 * white_rows(seed))
    steps = [
        SavedStep(step, lambda model=model: model) for step, model in zip((5, 9, 12), [*models, models[1]], strict=True)
    ]
    findings = report(models[1], windows, steps=steps)
    anew = pick(findings, "routes kept from step 5 to 9, beyond chance")
    kept = pick(findings, "routes kept from step 9 to 12, beyond chance")
    assert "drawn anew" in anew.verdict and anew.low < 0.1
    assert kept.value == pytest.approx(1.0) and "settled" in kept.verdict


# Attention distance --------------------------------------------------------------------------------------------------


def test_mean_distance_of_three_tokens_by_hand():
    """One head whose scores are the keys: the weights are 1; 1/4, 3/4; and 1/6, 1/3, 1/2."""
    q = torch.ones(1, 3, 1, dtype=torch.float64)
    k = torch.log(torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64))[None, :, None]
    assert mean_distance(q, k).tolist() == pytest.approx([0, 0.25, (2 * 1 + 1 * 3) / 5])
    two = mean_distance(torch.cat([q, 0 * q]), torch.cat([k, k]))
    assert two.tolist() == pytest.approx([0, (0.25 + 0.5) / 2, (1 + 1) / 2])
    alone = mean_distance(q, k, torch.tensor([0, 1, 1]))
    assert alone.tolist() == pytest.approx([0, 0, 0.75])


@pytest.mark.parametrize("norm", ("post", "pre"))
def test_distances_are_those_of_the_weights_that_the_model_uses(norm, monkeypatch):
    """Attention is done again from the distances' own queries and keys, and gives the sub-layer's result."""
    monkeypatch.setattr("megachiar.analysis.attention_distance.QUERIES", 5)
    model = lively_model(small_model_config(kind="baseline", norm=norm)).eval()
    tokens = token_batch(3, 13)
    windows = Windows(tokens[:, :-1].numpy(), tokens[:, 1:].numpy(), np.arange(3))
    seen = []
    layer = model.layers[1].operator
    layer.register_forward_pre_hook(lambda module, arguments: seen.append(module.queries_and_keys(*arguments[::3])))
    values = []
    layer.key_value.register_forward_hook(lambda _, __, output: values.append(output))
    results = []
    layer.output.register_forward_pre_hook(lambda _, arguments: results.append(arguments[0]))
    with torch.no_grad():
        found = attention_distances(model, windows, batch_size=3)
    assert found.shape == (4, 3, 12)
    (q, k), v = seen[0], values[-1].view(3, 12, 2, 2, 16)[:, :, 1].transpose(1, 2)
    scores = (q @ k.mT) / 4
    weights = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(36, 32)
    torch.testing.assert_close(mixed, results[0].reshape(36, 32), rtol=0, atol=1e-10)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    expected = (weights * distance).sum(-1).mean(1)
    np.testing.assert_allclose(found[1], expected.numpy(), rtol=0, atol=1e-10)


def test_a_relation_of_h_with_distance_is_found_and_that_of_a_hash_is_not():
    windows, model = zipf_windows(48), model_of_width(router={"tau": 0.823})
    with torch.no_grad():
        model.embedding.weight.copy_(0.02 * white_rows(3))
    entropy = collect_routes(model, windows, 16).entropy[0]
    rng = np.random.default_rng(0)
    position = np.arange(T)  # later tokens look further, whatever H is
    spread = float(entropy.std())
    distances = {
        "of H": position + 10 * entropy / spread + rng.normal(0, 3, entropy.shape),
        "of other ids": position + 10 * rng.normal(size=VOCABULARY)[windows.inputs],
    }
    clusters = Clusters(np.repeat(np.arange(48), T), windows.inputs.ravel())
    made, other = distance_findings(2, entropy, distances, clusters, seed=0)
    assert made.value > 0.8 and "longer dependencies" in made.verdict
    assert other.low < 0 < other.high and "no relation" in other.verdict


# Classes of tokens ---------------------------------------------------------------------------------------------------


def test_classes_of_frequency_hold_equal_parts_of_the_text():
    counts = np.array([10, 50, 0, 20, 20])
    assert frequency_classes(np.arange(5), counts, bins=4).tolist() == [3, 1, 3, 2, 3]
    ids = zipf_windows(200).inputs
    classes = frequency_classes(ids, np.bincount(ids.ravel(), minlength=VOCABULARY))
    shares = np.bincount(classes.ravel(), minlength=8) / ids.size
    assert shares.min() > 0.05 and shares.max() < 0.22
    assert (np.diff([ids[classes == c].mean() for c in range(8)]) > 0).all()  # small ids are the frequent ones here


def test_classes_of_position_and_loss_are_equal_parts():
    assert position_classes((2, 16), 4)[1].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert position_classes((1, 3), 8).tolist() == [[0, 1, 2]]
    values = np.random.default_rng(0).normal(size=800)
    classes = quantile_classes(values)
    assert np.bincount(classes).tolist() == [100] * 8
    assert values[classes == 0].max() <= values[classes == 1].min()
    assert quantile_classes(np.array([1.0, np.nan, 2.0, 3.0]), 2).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "form", "kind"),
    [
        (" the", "word", "function word"),
        ("The", "word", "function word"),
        (" Thou", "word", "function word"),
        (" Hamlet", "word", "capitalised word"),
        (" crown", "word", "other word"),
        ("'tis", "word", "other word"),
        (" Ham", "word start", "piece of a word"),
        ("let", "word part", "piece of a word"),
        (" 1603", "number", "number"),
        (",", "punctuation", "punctuation"),
        ("\n", "whitespace", "whitespace"),
        ("", "part of a character", "other"),
        ("", "control", "other"),
    ],
)
def test_kinds_of_words(text, form, kind):
    assert word_class(TokenText(text, None), form) == kind and kind in WORD_CLASSES


def test_the_verdict_on_channels_says_what_the_noise_test_said():
    rng = np.random.default_rng(0)
    routes, permuted = rng.integers(0, 2, 4000), rng.integers(0, 2, (16, 4000))
    assert "hash" in channel_findings(2, routes, permuted, like_noise=True)[0].verdict
    assert "belong to this order" in channel_findings(2, routes, permuted, like_noise=False)[0].verdict
