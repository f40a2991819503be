"""Values of single routes equal two forward passes of the oracle, and routes of a caller are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_cases import KEYS_OF_ROUTED, ROUTERS, lively_model, small_model_config, token_batch
from model_oracle import Oracle

from megachiar.analysis.route_interventions import intervention_routes, measure_interventions
from megachiar.analysis.route_value import choose_tokens, route_values
from megachiar.analysis.routed_tokens import collect_routes
from megachiar.analysis.windows import Windows
from megachiar.errors import UserError


class ForcedOracle(Oracle):
    """The oracle with given routes (B, T) of its routed layers, by the index of the layer."""

    def __init__(self, model, routes: dict[int, torch.Tensor]):
        weights = dict(model.named_parameters()) | dict(model.named_buffers())
        super().__init__(model.config, {name: tensor.detach() for name, tensor in weights.items()})
        self.routes = routes

    def routed(self, x, index, result):
        name = f"layers.{index}"
        operator = self.routes[index]
        functions = {"dct": self.dct, "rbf": self.rbf, "attention": self.attention}
        attends = operator == len(self.config.router.operators) - 1
        if self.config.attention.keys == "routed":
            functions["attention"] = lambda x, name: self.attention(x, name, attends)
        every = torch.stack([functions[o](x, f"{name}.{o}") for o in self.config.router.operators], -1)
        y = (every * F.one_hot(operator, every.shape[-1])[:, :, None].to(x)).sum(-1)
        return self.feed_forward(y, name)


def windows_of(tokens: torch.Tensor) -> Windows:
    """Windows of T tokens from sequences of T + 1."""
    return Windows(tokens[:, :-1].numpy(), tokens[:, 1:].numpy(), np.arange(len(tokens)))


def loss_of(oracle: Oracle, tokens: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed loss of one sequence (1, T)."""
    return F.cross_entropy(oracle(tokens).logits[0], targets[0], reduction="sum").item()


CASES = {
    "threshold": {"router": ROUTERS["threshold"]},
    "three operators": {"router": ROUTERS["threshold three"]},
    "hard": {"router": ROUTERS["hard"]},
    "random, pre-norm": {"router": ROUTERS["random"], "norm": "pre"},
    "keys of routed": {"router": ROUTERS["threshold"]} | KEYS_OF_ROUTED,
    "gate over the batch": {"router": ROUTERS["threshold"], "meta_router": {"pool": "batch"}},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_value_is_the_difference_of_two_forward_passes_of_the_oracle(fields):
    model = lively_model(small_model_config(**fields)).eval()
    tokens = token_batch(3, 13)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    chosen = np.array([[0, 0], [0, 7], [0, 11], [2, 3]])
    windows = windows_of(tokens)
    routed = collect_routes(model, windows, batch_size=2)
    found = route_values(model, routed, windows.targets, chosen, batch_size=4)
    assert [values.layer for values in found] == [1, 2]
    names = model.config.router.operators
    largest = 0.0
    for values in found:
        assert np.stack([values.sequence, values.position], 1).tolist() == chosen.tolist()
        for place, (sequence, position) in enumerate(chosen.tolist()):
            row, wanted = inputs[sequence : sequence + 1], targets[sequence : sequence + 1]
            routes = {n: torch.from_numpy(routed.operator[n - 1, sequence : sequence + 1]).long() for n in (1, 2)}
            assert values.operator[place] == routes[values.layer][0, position]
            losses = {}
            for name in ("dct", "attention"):
                forced = {index: operator.clone() for index, operator in routes.items()}
                forced[values.layer][0, position] = names.index(name)
                losses[name] = loss_of(ForcedOracle(model, forced), row, wanted)
            expected = losses["dct"] - losses["attention"]
            assert values.value[place] == pytest.approx(expected, abs=1e-9)
            largest = max(largest, abs(expected))
    assert largest > 1e-3, "no switch mattered, so that nothing was tested"


def test_values_do_not_depend_on_the_batch_size_or_on_the_order_of_tokens():
    model = lively_model(small_model_config(router=ROUTERS["threshold"])).eval()
    windows = windows_of(token_batch(4, 13))
    routed = collect_routes(model, windows, batch_size=3)
    chosen = choose_tokens(windows.targets, 10, seed=0)
    one = route_values(model, routed, windows.targets, chosen, batch_size=2)
    other = route_values(model, routed, windows.targets, chosen[::-1], batch_size=50)
    for first, second in zip(one, other, strict=True):
        assert first.position.tolist() == second.position.tolist()
        np.testing.assert_allclose(first.value, second.value, rtol=0, atol=1e-11)


def test_tokens_are_chosen_from_all_sequences_alike_and_have_targets():
    targets = np.arange(60).reshape(6, 10)
    targets[2, 4:] = -100
    chosen = choose_tokens(targets, 21, seed=1)
    assert len(np.unique(chosen, axis=0)) == 21
    assert (targets[chosen[:, 0], chosen[:, 1]] >= 0).all()
    assert np.bincount(chosen[:, 0]).min() >= 3 and np.bincount(chosen[:, 0]).max() <= 4
    assert choose_tokens(targets, 21, seed=1).tolist() == chosen.tolist()
    assert choose_tokens(targets, 21, seed=2).tolist() != chosen.tolist()
    assert len(choose_tokens(targets, 1000, seed=0)) == 54


def test_a_soft_router_has_no_routes_to_switch():
    model = lively_model(small_model_config(router=ROUTERS["soft"])).eval()
    windows = windows_of(token_batch(2, 13))
    routed = collect_routes(model, windows, batch_size=4)
    with pytest.raises(UserError, match="soft"):
        route_values(model, routed, windows.targets, np.array([[0, 0]]), batch_size=4)


@pytest.mark.parametrize("interval", (None, 1))
def test_a_forward_pass_takes_the_routes_it_is_given_and_writes_those_it_decides(interval):
    config = small_model_config(router=ROUTERS["threshold"])
    model = lively_model(config).eval()
    model.checkpoint_interval = interval
    if interval is not None:
        model.train()  # recomputation is of training alone; there is no dropout
    tokens = token_batch(2, 12)
    written: dict[str, torch.Tensor] = {}
    own = model(tokens, tokens, routes=written).loss
    assert set(written) == {"layers.1", "layers.2"}
    assert written["layers.1"].equal(model.layers[1].last_routes)
    forced = {"layers.1": 1 - written["layers.1"]}
    changed = model(tokens, tokens, routes=forced)
    assert model.layers[1].last_routes.equal(forced["layers.1"])
    assert set(forced) == {"layers.1", "layers.2"}
    oracle = ForcedOracle(model, {1: forced["layers.1"].view(2, 12), 2: forced["layers.2"].view(2, 12)})
    expected = F.cross_entropy(oracle(tokens).logits.flatten(0, 1), tokens.flatten())
    assert changed.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert abs(changed.loss.item() - own.item()) > 1e-4
    changed.loss.backward()


# All routes at once --------------------------------------------------------------------------------------------------


def test_other_routes_for_all_tokens_have_the_loss_of_the_oracle():
    model = lively_model(small_model_config(router=ROUTERS["threshold"])).eval()
    tokens = token_batch(5, 13)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    windows = windows_of(tokens)
    routed = collect_routes(model, windows, batch_size=2)
    changes = measure_interventions(model, routed, windows, seed=0, batch_size=2)
    own = routed.losses.mean()
    for name, variants in intervention_routes(routed, 0).items():
        losses = []
        for routes in variants:
            forced = {1: torch.from_numpy(routes[0]).long(), 2: torch.from_numpy(routes[1]).long()}
            logits = ForcedOracle(model, forced)(inputs).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
        assert changes[name].value == pytest.approx(np.mean(losses) - own, abs=1e-10), name
        assert changes[name].low < changes[name].value < changes[name].high
    coins = intervention_routes(routed, 0)["a coin for each token"]
    shares = [(coin == 1).mean((1, 2)).tolist() for coin in coins]
    assert all(share == routed.attends.mean((1, 2)).tolist() for share in shares)
