"""Calibration of thresholds agrees with numpy and scipy in its statistics, and the tool works on real runs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
import yaml
from model_cases import THREE, TWO, small_model_config
from model_oracle import permutation
from support import ROOT, forked_python, pretrain, small_config, write_config, write_tokens

from megachiar.analysis.calibration import (
    Sample,
    calibrate_on_embedding,
    calibrate_on_layers,
    config_for,
    correlation_within,
    distribution_distance,
    effective_size,
)
from megachiar.analysis.windows import spread_windows, token_counts
from megachiar.checkpoint.format import complete_checkpoints
from megachiar.checkpoint.reading import read_weights
from megachiar.config import load_config
from megachiar.data.sampling.dataset import TokenSource, ValidationSet
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.kernels.spectral import white_noise_entropy
from megachiar.model import build_model

TOOL = "tools/calibrate_tau.py"


def entropy_oracle(rows: np.ndarray) -> np.ndarray:
    power = scipy.fft.dct(rows.astype(np.float64), norm="ortho") ** 2
    return scipy.stats.entropy(power, axis=-1) / np.log(rows.shape[-1])


# Statistics ----------------------------------------------------------------------------------------------------------


def test_a_counted_sample_is_described_like_its_repetition():
    rng = np.random.default_rng(0)
    values, counts = rng.normal(0.8, 0.01, 300), rng.integers(1, 9, 300)
    whole = np.repeat(values, counts)
    described = Sample(values, counts).describe()
    assert (described.mean, described.deviation) == pytest.approx((whole.mean(), whole.std()), rel=1e-12)
    for percentile, value in described.percentiles.items():
        assert value == np.percentile(whole, percentile, method="inverted_cdf")


def test_distance_of_distributions_is_kolmogorovs_and_smirnovs():
    rng = np.random.default_rng(1)
    first, second = rng.normal(0, 1, 500), rng.normal(0.3, 1.2, 700)
    expected = scipy.stats.ks_2samp(first, second).statistic
    assert distribution_distance(Sample(first), Sample(second)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("share", (0.0, 0.1, 0.5, 1.0))
def test_a_threshold_leaves_the_share_not_above_it(share):
    values = np.random.default_rng(2).uniform(0.1, 0.9, 1000)
    assert (values <= Sample(values).threshold(share)).mean() == pytest.approx(share, abs=1e-9)


def test_a_threshold_between_equal_numbers_is_the_nearest():
    """Of 100 numbers 30 are equal, but for rounding: those that lie nearer to the share are on its side."""
    noise = 1e-8 * np.random.default_rng(2).uniform(-1, 1, 30)
    values = np.concatenate([np.linspace(0.1, 0.2, 40), 0.5 + noise, np.linspace(0.7, 0.8, 30)])
    for share, left in ((0.45, 0.4), (0.6, 0.7), (0.3, 0.3), (0.9, 0.9)):
        assert (values <= Sample(values).threshold(share)).mean() == pytest.approx(left, abs=1e-9)


# Reading -------------------------------------------------------------------------------------------------------------


def test_all_tokens_are_counted_or_as_many_as_wanted_from_all_over_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr("megachiar.data.sampling.dataset.READ_TOKENS", 100)
    source = TokenSource(write_tokens(tmp_path / "train"))
    tokens = np.asarray(source.dataset.tokens)
    assert token_counts(source, 64, 10**9).tolist() == np.bincount(tokens, minlength=64).tolist()
    some = token_counts(source, 64, 1000)
    assert some.sum() == 1000
    assert some.tolist() != np.bincount(tokens[:1000], minlength=64).tolist()


def test_windows_are_spread_over_the_text_and_full(tmp_path):
    dataset = ValidationSet(write_tokens(tmp_path / "valid"), 32)
    inputs, targets, numbers = spread_windows(dataset, 5)
    assert inputs.shape == targets.shape == (5, 32) and (targets >= 0).all()
    last = dataset.targets // 32 - 1
    assert inputs[0].tolist() == dataset.batch(0, 1)[0][0].tolist()
    assert inputs[-1].tolist() == dataset.batch(last, last + 1)[0][0].tolist()
    assert (numbers[0], numbers[-1]) == (0, last)
    short = ValidationSet(write_tokens(tmp_path / "short", documents=1), 1000)
    inputs, targets, _ = spread_windows(short, 5)
    assert inputs.shape == (1, short.targets) and (targets >= 0).all()


# Warning of noise ----------------------------------------------------------------------------------------------------


def test_embeddings_of_white_noise_are_called_noise_and_smooth_ones_are_not(tmp_path):
    source = TokenSource(write_tokens(tmp_path / "train", vocab_size=400, documents=300))
    model = build_model(small_model_config(vocab_size=400, hidden_size=128), seed=0)
    fresh = calibrate_on_embedding(model, source, 10**6)
    assert fresh.places[0].like_noise
    assert (fresh.noise.mean, fresh.noise.deviation) == white_noise_entropy(128)
    assert fresh.places[0].measured.mean == pytest.approx(fresh.noise.mean, abs=0.003)
    with torch.no_grad():
        model.embedding.weight.copy_(
            model.embedding.weight.cumsum(-1)
        )  # neighbouring channels become alike: low frequencies
    smooth = calibrate_on_embedding(model, source, 10**6).places[0]
    assert not smooth.like_noise and smooth.noise_distance > 0.9


def zipf_dataset(folder: Path, tokens: int = 20_000, vocab_size: int = 2_000) -> ValidationSet:
    """A text whose token frequencies are those of words: the k-th is 1/k as frequent as the first."""
    shares = 1 / np.arange(1, vocab_size + 1)
    ids = np.random.default_rng(0).choice(vocab_size, tokens, p=shares / shares.sum())
    with IndexedDatasetBuilder(folder / "zipf", np.uint16) as builder:
        builder.add_document(ids)
    return ValidationSet(folder / "zipf", 64)


@pytest.mark.parametrize(
    ("place", "models"),
    [("embedding", 100), ("layers", 15), pytest.param("layers", 100, marks=pytest.mark.slow)],
)
def test_white_noise_is_told_from_smooth_embeddings_in_95_of_100_models(tmp_path, place, models):
    """Few of the tokens of a text are independent: one frequent word decides for a tenth of them."""
    dataset = zipf_dataset(tmp_path)
    config = small_model_config(vocab_size=2_000, hidden_size=64, num_attention_heads=2, max_sequence_length=64)
    generator, verdicts = torch.Generator(), []
    model = build_model(config, seed=0).eval()
    for seed in range(models):
        white = torch.randn(2_000, 64, generator=generator.manual_seed(seed))
        smooth = white + 0.3 * white.cumsum(-1)
        for weight in (white, smooth):
            with torch.no_grad():
                model.embedding.weight.copy_(0.02 * weight)
            if place == "embedding":
                measured = calibrate_on_embedding(model, dataset.source, 10**6).places[0]
            else:
                measured = calibrate_on_layers(model, dataset, 0.5, 40).places[0]
            verdicts.append(measured.like_noise)
    assert sum(verdicts[::2]) >= 0.95 * models - 1 and sum(verdicts[1::2]) <= 0.05 * models
    assert models < 100 or sum(verdicts[::2]) >= 95


@pytest.mark.parametrize(("within", "expected"), [(0.0, 1.0), (1.0, 0.5), (3.0, 0.1), (1e3, 0.0)])
def test_the_correlation_within_ids_is_the_share_of_variance_between_them(within, expected):
    rng = np.random.default_rng(3)
    ids = np.repeat(np.arange(400), rng.integers(1, 9, 400))
    values = rng.normal(0, 1, 400)[ids] + within * rng.normal(0, 1, len(ids))
    assert correlation_within(values, ids) == pytest.approx(expected, abs=0.08)


def test_the_effective_size_is_that_of_independent_samples():
    """The variance of the mean of correlated values says how many independent ones they are worth."""
    counts, rng = np.array([50, 20, 20, 5, 5, 1, 1, 1, 1, 1]), np.random.default_rng(4)
    ids = np.repeat(np.arange(10), counts)
    for within in (0.0, 1.0):
        draws = rng.normal(0, 1, (4000, 10))[:, ids] + within * rng.normal(0, 1, (4000, len(ids)))
        worth = draws.var() / draws.mean(1).var()
        assert effective_size(counts, 1 / (1 + within**2)) == pytest.approx(worth, rel=0.06)


def test_three_operators_get_two_thresholds_and_equal_shares_below(tmp_path):
    config = small_model_config(router={"operators": THREE, "tau_low": 0.5, "tau_high": 0.9}, vocab_size=64)
    model = build_model(config, seed=0).eval()
    dataset = ValidationSet(write_tokens(tmp_path / "valid"), 16)
    router = calibrate_on_layers(model, dataset, 0.4, 32).router
    assert set(router) == {"kind", "operators", "tau_low", "tau_high"}
    routed = build_model(config.model_copy(update={"router": type(config.router)(**router)}), seed=0).eval()
    statistics = routed(torch.from_numpy(spread_windows(dataset, 32)[0])).statistics
    assert statistics.attention_share[1:-1].tolist() == pytest.approx([0.4, 0.4], abs=0.02)
    assert statistics.rbf_share[1:-1].tolist() == pytest.approx([0.3, 0.3], abs=0.02)
    one = calibrate_on_embedding(model, dataset.source, 10**6)
    assert one.router["tau_low"] == pytest.approx(one.places[0].measured.percentiles[33], abs=1e-6)
    assert one.router["tau_high"] == pytest.approx(one.places[0].measured.percentiles[67], abs=1e-6)


@pytest.mark.parametrize("operators", (TWO, THREE))
@pytest.mark.parametrize("own", ("threshold", "hashed"))
def test_thresholds_for_a_hashed_router_give_its_shares(tmp_path, own, operators):
    """A model with thresholds of one kind is measured for the other: its routers become those that are wanted."""
    names = ("tau_low", "tau_high") if operators == THREE else ("tau",)
    router = {"kind": own, "operators": operators, **dict(zip(names, (0.5, 0.9), strict=False))}
    config = small_model_config(router=router, vocab_size=64)
    dataset = ValidationSet(write_tokens(tmp_path / "valid"), 16)
    wanted = config_for(config, "hashed", 7)
    found = calibrate_on_layers(build_model(config, seed=0).eval(), dataset, 0.4, 32, wanted).router
    assert (found["kind"], found["seed"], set(names) <= set(found)) == ("hashed", 7, True)
    routed = build_model(config.model_copy(update={"router": type(config.router)(**found)}), seed=0).eval()
    statistics = routed(torch.from_numpy(spread_windows(dataset, 32)[0])).statistics
    assert statistics.attention_share[1:-1].tolist() == pytest.approx([0.4, 0.4], abs=0.02)
    assert statistics.rbf_share[1:-1].tolist() == pytest.approx([0.3 * (operators == THREE)] * 2, abs=0.02)
    other = calibrate_on_layers(build_model(config, seed=0).eval(), dataset, 0.4, 32, config_for(config, "hashed", 8))
    assert other.router[names[-1]] != found[names[-1]], "another seed has other permutations"


def test_a_hashed_router_gets_a_threshold_of_the_embedding_for_each_layer(tmp_path):
    config = small_model_config(kind="baseline", router={}, vocab_size=64)  # such as the run that a tau is taken from
    model = build_model(config, seed=0)
    source = TokenSource(write_tokens(tmp_path / "train"))
    found = calibrate_on_embedding(model, source, 10**9, config_for(config, "hashed", 3))
    tokens = np.asarray(source.dataset.tokens).astype(np.int64)
    for layer, place, tau in zip((1, 2), found.places, found.router["tau"], strict=True):
        h = entropy_oracle(model.embedding.weight.detach().numpy()[:, permutation(3, layer, 32)])[tokens]
        assert place.measured.mean == pytest.approx(h.mean(), abs=1e-5)
        assert tau == pytest.approx(np.percentile(h, (33, 67), method="inverted_cdf").mean(), abs=1e-5)
    assert len(calibrate_on_embedding(model, source, 10**9).places) == 1


# The tool ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["chiar", "baseline"])
def run_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=6)
    config = small_config(folder)
    config["model"]["kind"] = request.param
    config["training"]["steps"] = 2
    pretrain(write_config(folder / "config.yaml", config))
    return folder / "run"


def test_tau_of_the_embedding_is_the_middle_of_its_percentiles(run_folder):
    done = forked_python(TOOL, run_folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    weights = read_weights(complete_checkpoints(run_folder / "checkpoints")[-1])
    tokens = np.asarray(TokenSource(run_folder.parent / "train").dataset.tokens).astype(np.int64)
    h = entropy_oracle(weights["embedding.weight"].detach().numpy())[tokens]
    (place,) = found["places"]
    assert place["tokens"] == len(tokens)
    assert (place["measured"]["mean"], place["measured"]["deviation"]) == pytest.approx((h.mean(), h.std()), abs=1e-5)
    low, high = (np.percentile(h, p, method="inverted_cdf") for p in (33, 67))
    assert found["router"]["tau"] == pytest.approx((low + high) / 2, abs=1e-5)
    assert place["like_noise"] and "warning" in done.stderr and "routes at random" in done.stderr, (
        "nothing is learned yet"
    )


def test_taus_of_the_layers_give_the_attention_share_that_was_asked_for(run_folder):
    """The printed list goes into the config unchanged, and the model then routes the share that was asked for."""
    share = 0.3
    valid = run_folder.parent / "valid"
    done = forked_python(TOOL, run_folder, "--where", "layers", "--attention-share", str(share), "--data", valid)
    assert done.returncode == 0, done.stderr
    router = yaml.safe_load(done.stdout[done.stdout.index("# under model.router") :])
    assert len(router["tau"]) == 2
    assert "white noise" in done.stdout and "layer 2" in done.stdout and "layer 3" in done.stdout
    checkpoint = complete_checkpoints(run_folder / "checkpoints")[-1]
    config = load_config(checkpoint / "config.yaml").model
    routed = config.model_copy(update={"router": type(config.router)(**router)})
    model = build_model(routed, seed=0).eval()
    model.load_state_dict(read_weights(checkpoint))
    inputs, *_ = spread_windows(ValidationSet(valid, 32), 64)
    entered = []
    for layer in model.layers[1:3]:
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach().numpy()))
    statistics = model(torch.from_numpy(inputs)).statistics
    above = [(entropy_oracle(rows) > tau).mean() for rows, tau in zip(entered, router["tau"], strict=True)]
    assert above == pytest.approx([share, share], abs=0.02)
    if config.kind == "chiar":
        assert statistics.attention_share[1:3].tolist() == pytest.approx([share, share], abs=0.02)


def test_the_tool_prints_the_router_of_the_control(run_folder):
    done = forked_python(TOOL, run_folder, "--router", "hashed", "--seed", "4")
    assert done.returncode == 0, done.stderr
    router = yaml.safe_load(done.stdout[done.stdout.index("# under model.router") :])
    assert (router["kind"], router["seed"], len(router["tau"])) == ("hashed", 4, 2)
    assert "embedding, for layer 3" in done.stdout
    assert "warning" not in done.stderr, "the control is meant to look like noise"
    done = forked_python(TOOL, run_folder, "--seed", "4")
    assert done.returncode == 2 and "no effect on thresholds of H itself" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attention-share", "0.5"), "no effect with --where embedding"),
        (("--where", "layers", "--attention-share", "1.5"), "1.5 is not at least 0 and at most 1"),
        (("--where", "layers", "--sequences", "0"), "--sequences: 0 is not at least 1"),
        (("--tokens", "-1"), "--tokens: -1 is not at least 1"),
        (("--json",), "no such folder"),
    ],
)
def test_bad_arguments_end_in_one_message(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", [TOOL, str(tmp_path / "no_run"), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / TOOL), run_name="__main__")
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert message in output.err and "Traceback" not in output.err and output.out == ""
