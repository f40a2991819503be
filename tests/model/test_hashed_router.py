"""The hashed router: H of permuted channels decides, and all else is as with the threshold router.

What it computes is compared with an oracle in ``test_oracle.py``; here stands what makes it a control.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from model_cases import MIDDLE, lively_model, small_model_config, token_batch

from megachiar.model.router import Router, channel_permutations
from megachiar.topology import SINGLE_RANK

CPU = torch.device("cpu")


def entropy(rows: torch.Tensor) -> np.ndarray:
    power = scipy.fft.dct(rows.double().numpy(), norm="ortho") ** 2
    return scipy.stats.entropy(power, axis=-1) / np.log(rows.shape[-1])


def decisions(model, tokens: torch.Tensor) -> list:
    """Return inputs and decision of each router in a forward pass."""
    seen: list = []
    for layer in model.layers[1:-1]:
        layer.router.register_forward_hook(lambda _, args, decision: seen.append((args[0], decision)))
    with torch.no_grad():
        model(tokens)
    return seen


def test_permutations_are_fixed_by_seed_and_layer_alone():
    orders = channel_permutations(3, 8, 64, CPU)
    assert orders.sort(1).values.equal(torch.arange(64).expand(8, -1))
    assert orders.equal(channel_permutations(3, 12, 64, CPU)[:8]), "whatever the depth of the model"
    everything = torch.cat([orders, channel_permutations(4, 8, 64, CPU), torch.arange(64)[None]])
    assert len(set(map(tuple, everything.tolist()))) == 17, "other layers and seeds have others"
    fixed = (everything[:, None] == everything[None]).sum(-1) - 64 * torch.eye(17, dtype=torch.int64)
    assert fixed.max() < 8 and fixed.double().sum() / (17 * 16) < 1.5  # two permutations share one place in the mean


def test_the_reported_entropy_is_that_of_the_row_and_the_score_that_of_the_permuted_one():
    model = lively_model(small_model_config(router={"kind": "hashed", "tau": MIDDLE, "seed": 2}))
    orders = channel_permutations(2, 4, 32, CPU)
    for index, (rows, decision) in enumerate(decisions(model, token_batch(4, 16)), 1):
        of_rows, of_permuted = entropy(rows), entropy(rows[:, orders[index]])
        np.testing.assert_allclose(decision.entropy, of_rows, rtol=0, atol=1e-9)
        np.testing.assert_allclose(decision.score, of_permuted, rtol=0, atol=1e-9)
        assert (decision.operator.numpy() == (of_permuted > MIDDLE)).all()
        assert np.abs(of_rows - of_permuted).mean() > 1e-3, "the order must matter, or this test shows nothing"


def test_it_routes_smooth_rows_as_a_coin_would():
    """Rows of low frequencies have a low H, and the threshold router knows them; to the hashed one they are noise."""
    generator = torch.Generator().manual_seed(0)
    n, d = 4000, 64
    noise = torch.randn(n, d, generator=generator)
    spectrum = noise.clone()
    spectrum[: n // 2, d // 2 :] = 0  # one half of the rows is smooth
    rows = torch.from_numpy(scipy.fft.idct(spectrum.double().numpy(), norm="ortho")).float()
    smooth = torch.arange(n) < n // 2
    agreement = {}
    for kind in ("threshold", "hashed"):
        router = Router(small_model_config(hidden_size=d, router={"kind": kind, "tau": 0.5}), 1, SINGLE_RANK)
        score = router(rows, None).score
        router.set_thresholds((score.median().item(),))
        agreement[kind] = (router(rows, None).operator.bool() != smooth).double().mean().item()
    assert agreement["threshold"] > 0.99
    assert agreement["hashed"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", ("threshold", "hashed"))
def test_in_the_first_routed_layer_a_token_always_takes_one_route(kind):
    """Without the gate of layer 1 a row there depends on its token alone: both routers are tables of the vocabulary."""
    config = small_model_config(router={"kind": kind, "tau": MIDDLE}, meta_router={"pool": "none"})
    tokens = token_batch(16, 16)
    first, second = (d.operator.view(16, 16) for _, d in decisions(lively_model(config), tokens))
    for token in range(31):
        assert len(first[tokens == token].unique()) <= 1
    assert any(len(second[tokens == token].unique()) == 2 for token in range(31))
    assert len(first.unique()) == 2
