"""The DCT against scipy's, in both forms; spectral entropy and spectral mixing against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import torch

from megachiar.kernels import dct as dct_module
from megachiar.kernels.dct import dct, idct, packed, packed_dct, packed_idct, packed_power, unpacked
from megachiar.kernels.spectral import spectral_entropy, spectral_mix, spectrum_and_entropy, white_noise_entropy

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 63, 64, 65, 97, 128, 129, 255, 256, 509, 512, 768, 1000, 1023, 1024)


@pytest.fixture(params=["matrix", "fft"])
def form(request, monkeypatch):
    """Makes every length take one of the two forms."""
    monkeypatch.setattr(dct_module, "FFT_FROM", 0 if request.param == "fft" else 10**9)
    return request.param


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("d", LENGTHS)
def test_dct_and_inverse_are_scipys_orthonormal_ones(form, d):
    x = noise(3, 2, d)
    forward = scipy.fft.dct(x.numpy(), type=2, norm="ortho")
    backward = scipy.fft.idct(x.numpy(), type=2, norm="ortho")
    np.testing.assert_allclose(dct(x).numpy(), forward, rtol=0, atol=1e-12)
    np.testing.assert_allclose(idct(x).numpy(), backward, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", (1, 2, 7, 64, 97))
def test_gradients_of_the_transforms(form, d):
    x = noise(2, d).requires_grad_()
    assert torch.autograd.gradcheck(dct, x)
    assert torch.autograd.gradcheck(idct, x)


def test_16_bit_rows_are_transformed_in_fp32(form):
    x = noise(4, 128).bfloat16()
    assert dct(x).dtype == idct(x).dtype == torch.float32
    torch.testing.assert_close(dct(x).double(), dct(x.double()), rtol=0, atol=1e-5)


def test_no_rows(form):
    assert dct(noise(0, 64)).shape == idct(noise(0, 64)).shape == (0, 64)


def test_a_table_made_in_inference_mode_serves_training_too(form):
    dct_module.dct_matrix.cache_clear()
    dct_module._fft_tables.cache_clear()
    with torch.inference_mode():
        dct(noise(2, 96))
    x = noise(2, 96).requires_grad_()
    idct(dct(x)).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", (1, 2, 3, 8, 9, 64, 97, 128))
def test_a_packed_spectrum_holds_each_frequency_at_its_place(form, d):
    x, weight = noise(3, d), noise(d, seed=1)
    spectrum = torch.from_numpy(scipy.fft.dct(x.numpy(), type=2, norm="ortho"))
    numbers = packed_dct(x)
    torch.testing.assert_close(packed_idct(numbers, d), x, rtol=0, atol=1e-12)
    filtered = torch.from_numpy(scipy.fft.idct((spectrum * weight).numpy(), type=2, norm="ortho"))
    torch.testing.assert_close(packed_idct(numbers * packed(weight), d), filtered, rtol=0, atol=1e-12)
    for row, expected in zip(numbers.square(), spectrum.square(), strict=True):
        torch.testing.assert_close(unpacked(row, d), expected, rtol=0, atol=1e-12)
    power = packed_power(numbers, d, 3.0)
    expected = spectrum.square().sum(-1) + 2 * spectrum[:, 0].square()
    torch.testing.assert_close(power.sum(-1), expected, rtol=0, atol=1e-11)


# Spectral entropy ----------------------------------------------------------------------------------------------------


def entropy_oracle(x: np.ndarray, dc_weight: float, epsilon: float) -> float:
    """H of one token in plain numpy, with the transform and the three epsilons of the published code."""
    power = (2 * scipy.fft.dct(x, norm="ortho")) ** 2
    power[0] *= dc_weight
    if power.sum() == 0:
        return 0.0
    total = power.sum() + epsilon
    return -sum(p / total * math.log(p / total + epsilon) for p in power if p > 0) / (math.log(len(x)) + epsilon)


@pytest.mark.parametrize(("dc_weight", "epsilon"), [(1.0, 0.0), (2.0, 0.0), (1.0, 1e-8), (2.0, 1e-3)])
@pytest.mark.parametrize("d", (2, 5, 64, 256))
def test_entropy_is_its_formula(form, d, dc_weight, epsilon):
    x = noise(6, d)
    x[1] = 0  # no power at all
    x[2] = 1  # a constant: all power at frequency zero
    x[3] += 5
    x[4] *= 1e-3  # as small as rows of an embedding: an epsilon beside their power counts
    expected = [entropy_oracle(row, dc_weight, epsilon) for row in x.numpy()]
    got = spectral_entropy(x, dc_weight, epsilon)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)
    assert got[1] == 0
    assert spectrum_and_entropy(x, dc_weight, epsilon)[1].equal(got)


def test_entropy_is_0_for_one_frequency_and_1_for_equal_power(form):
    one, equal = torch.zeros(64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    one[17] = 3.0
    got = spectral_entropy(idct(torch.stack([one, equal])))
    torch.testing.assert_close(got, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", (16, 17))
def test_gradient_of_entropy_is_finite_for_empty_frequencies_and_tokens(form, d):
    assert torch.autograd.gradcheck(lambda x: spectral_entropy(x, 2.0, 1e-8), noise(3, d).requires_grad_())
    for epsilon in (0.0, 1e-8):
        x = noise(3, d)
        x[0], x[1] = 0, 1
        x.requires_grad_()
        spectral_entropy(x, 1.0, epsilon).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("scale", (1e-12, 1e12))
def test_entropy_does_not_depend_on_the_scale_of_a_token(scale):
    x = noise(4, 256).float()
    torch.testing.assert_close(spectral_entropy(x * scale), spectral_entropy(x), rtol=0, atol=1e-5)


# White noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "mean", "deviation"), [(1024, 0.8949, 0.0040), (256, 0.8691, 0.0100)])
def test_white_noise_entropy_has_the_known_values(d, mean, deviation):
    assert white_noise_entropy(d) == pytest.approx((mean, deviation), abs=5e-5)


@pytest.mark.parametrize("d", (2, 3, 64, 257))
def test_white_noise_entropy_is_what_white_noise_has(d):
    samples = spectral_entropy(noise(100_000 if d < 64 else 20_000, d))
    mean, deviation = white_noise_entropy(d)
    error = samples.std().item() / math.sqrt(len(samples))
    assert samples.mean().item() == pytest.approx(mean, abs=4 * error)
    assert samples.std().item() == pytest.approx(deviation, rel=0.03)


# Spectral mixing -----------------------------------------------------------------------------------------------------


def mix_oracle(x: torch.Tensor, weight: torch.Tensor, gain: float) -> torch.Tensor:
    """The definition with scipy's matrix of the transform."""
    c = torch.from_numpy(scipy.fft.dct(np.eye(x.shape[-1]), axis=0, norm="ortho"))
    return gain * (x @ c.T * weight) @ c


@pytest.mark.parametrize("known", (False, True))
@pytest.mark.parametrize("d", (2, 9, 16, 64))
def test_spectral_mix_is_its_definition_forward_and_backward(form, d, known):
    x, weight = noise(5, d).requires_grad_(), noise(d, seed=1).requires_grad_()
    spectrum = packed_dct(x.detach()) if known else None
    direction = noise(5, d, seed=2)
    got, expected = spectral_mix(x, weight, 2.0, spectrum), mix_oracle(x, weight, 2.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for g, e in zip(
        torch.autograd.grad(got, (x, weight), direction),
        torch.autograd.grad(expected, (x, weight), direction),
        strict=True,
    ):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-11)
    assert torch.autograd.gradcheck(lambda x, w: spectral_mix(x, w, 0.7), (x, weight))


def test_spectral_mix_of_no_rows_gives_the_filter_a_gradient():
    weight = torch.ones(64, requires_grad=True)
    spectral_mix(torch.zeros(0, 64), weight).sum().backward()
    assert weight.grad.equal(torch.zeros(64))


def test_spectral_mix_of_bf16_rows_is_computed_in_fp32():
    x, weight = noise(32, 256).bfloat16().requires_grad_(), (1 + noise(256, seed=1)).bfloat16().requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    got, expected = spectral_mix(x, weight), mix_oracle(*wide, 1.0)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-5)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad.double(), wide[0].grad, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), wide[1].grad, rtol=2**-7, atol=1e-3)
