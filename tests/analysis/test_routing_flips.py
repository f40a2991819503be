"""Flips between routes in 16 bits and in fp32 are counted correctly, and the entropy itself is computed in fp32."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from model_cases import ROUTERS, lively_model, small_model_config, token_batch
from model_oracle import permutation
from support import forked_python, pretrain, small_config, write_config, write_tokens

from megachiar.analysis.flips import routing_flips
from megachiar.analysis.windows import Windows
from megachiar.kernels.spectral import spectrum_and_entropy

TOOL = "tools/routing_flips.py"


def entropy_oracle(rows: torch.Tensor) -> np.ndarray:
    power = scipy.fft.dct(rows.double().numpy(), norm="ortho") ** 2
    return scipy.stats.entropy(power, axis=-1) / np.log(rows.shape[-1])


def flips_of(router: dict, dtype: torch.dtype = torch.bfloat16, batch_size: int = 4):
    config = small_model_config(hidden_size=64, num_layers=5, router=router)
    model = lively_model(config, dtype=torch.float32).eval()
    tokens = token_batch(8, 17).numpy()
    found = routing_flips(model, dtype, Windows(tokens[:, :-1], tokens[:, 1:], np.arange(8)), batch_size)
    assert [layer.layer for layer in found] == [2, 3, 4] and all(layer.tokens == 8 * 16 for layer in found)
    return model, found


@pytest.mark.parametrize("d", (96, 256))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_entropy_of_16_bit_rows_is_fp32s(dtype, d):
    rows = torch.randn(200, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, entropy = spectrum_and_entropy(rows)
    assert entropy.dtype == torch.float32
    np.testing.assert_allclose(entropy.numpy(), entropy_oracle(rows), rtol=0, atol=1e-6)


def test_fp32_against_itself_flips_nothing():
    for layer in flips_of({"tau": 0.85}, torch.float32)[1]:
        assert layer.rounded == layer.whole == layer.entropy_change == 0


@pytest.mark.parametrize("router", ({"tau": 0.0}, {"tau": 1.0}, ROUTERS["random"]), ids=str)
def test_thresholds_far_from_every_token_and_hashes_flip_nothing(router):
    for layer in flips_of(router)[1]:
        assert layer.rounded == layer.whole == 0


@pytest.mark.parametrize("kind", ("threshold", "hashed"))
def test_flips_by_rounding_are_the_tokens_that_cross_the_threshold(kind):
    """Compare with scipy in float64, on the hidden states that the fp32 model's routers read."""
    model, found = flips_of({"kind": kind, "tau": 0.85})
    rows: dict[int, torch.Tensor] = {}
    for index in (1, 2, 3):
        model.layers[index].router.register_forward_pre_hook(lambda _, args, i=index: rows.update({i: args[0]}))
    with torch.no_grad():
        model(token_batch(8, 17)[:, :-1])
    for layer in found:
        order = permutation(0, layer.layer - 1, 64) if kind == "hashed" else list(range(64))
        seen = rows[layer.layer - 1][:, order]
        exact, rounded = (entropy_oracle(r) for r in (seen, seen.bfloat16()))
        assert layer.rounded == ((exact > 0.85) != (rounded > 0.85)).mean()
        assert layer.entropy_change == pytest.approx(np.abs(exact - rounded).mean(), rel=1e-2)
        assert layer.margin == pytest.approx(np.sort(np.abs(exact - 0.85))[63], abs=1e-6)
    assert max(layer.whole for layer in found) > 0, "bf16 must flip some, or this test shows nothing"


def test_all_batches_are_counted():
    for one, other in zip(*(flips_of({"tau": 0.85}, batch_size=n)[1] for n in (3, 8)), strict=True):
        assert (one.rounded, one.whole) == (other.rounded, other.whole)
        assert one.entropy_change == pytest.approx(other.entropy_change, rel=1e-4)


def test_the_tool(tmp_path):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    config = small_config(tmp_path, training={"steps": 2})
    pretrain(write_config(tmp_path / "config.yaml", config))
    done = forked_python(TOOL, tmp_path / "run", "--data", tmp_path / "valid", "--sequences", "8", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["step"] == 2 and found["precision"] == "bf16"
    assert [layer["layer"] for layer in found["layers"]] == [2, 3]
    assert all(layer["tokens"] == 8 * 32 and 0 <= layer["whole"] < 0.2 for layer in found["layers"])
    done = forked_python(TOOL, tmp_path / "run", "--precision", "fp16")
    assert done.returncode == 0 and "whole model" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--sequences", "0"), "--sequences: 0 is not at least 1"), ((), "no such folder")],
    ids=str,
)
def test_bad_arguments_end_in_one_message(tmp_path, arguments, message):
    done = forked_python(TOOL, tmp_path / "no_run", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
