"""A routed layer of static shapes: the numbers of the layer whose shapes follow the routes, and no wait of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import MIDDLE, lively_model, small_model_config, token_batch
from torch._dynamo.utils import counters
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from megachiar.kernels.spectral import spectral_entropy
from megachiar.model.batch_layout import BatchLayout, lay_out
from megachiar.model.compiled import compile_layers
from megachiar.model.init import initialise
from megachiar.model.layer import RoutedLayer
from megachiar.model.layer_stack import build_layer, statistics
from megachiar.model.static_shapes import use_static_shapes
from megachiar.topology import SINGLE_RANK

SEQUENCES, LENGTH, LAYER = 3, 12, 1
END = 0
"""The token that ends a document."""
WAITS = (
    *("nonzero", "_local_scalar_dense", "item", "is_nonzero", "equal", "bincount"),
    *("masked_select", "masked_scatter", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
)


COPIES = ("tolist", "cpu", "numpy", "item")
"""Methods of a tensor that copy it to the host, which a dispatcher does not see on a CPU."""


def refuse(tensor: torch.Tensor, *_, **__) -> None:
    raise AssertionError("a copy to the host")


def without_device(convert: Callable) -> Callable:
    """Return ``Tensor.to`` that refuses a device: what computes on one device has nothing to move."""

    def to(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        given = [*arguments, *named.values()]
        assert not any(isinstance(each, str | torch.device | torch.Tensor) for each in given), "a copy to a device"
        return convert(tensor, *arguments, **named)

    return to


class NoWait(TorchDispatchMode):
    """Fails where the host would wait for a GPU: where it asks for values, or for a shape that hangs on them.

    It also looks into the operations of the package, which a dispatcher sees as one each.
    """

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        namespace, _, name = function._schema.name.partition("::")
        assert name not in WAITS, name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in arguments[1]), "a mask, whose rows are counted"
        if name == "repeat_interleave":
            assert (named or {}).get("output_size") is not None, "a length that hangs on values"
        self.see(name, arguments, named or {})
        if namespace == "megachiar":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))

    def see(self, name: str, arguments: tuple, named: dict[str, Any]) -> None:
        """Look at an operation before it runs."""


def static_case(
    share: float = 0.5,
    kind: str = "threshold",
    dropout: float = 0.0,
    documents: bool = False,
    dtype: torch.dtype = torch.float64,
    d: int = 32,
    **fields: Any,
) -> tuple[RoutedLayer, torch.Tensor, BatchLayout]:
    """Return a layer without neutral weights, hidden states of which ``share`` go to attention, and their layout.

    The second sequence has no row for attention unless all have.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SEQUENCES * LENGTH, d, dtype=torch.float64, generator=generator)
    if share < 1:
        x[LENGTH : 2 * LENGTH] = 1 + 0.1 * x[LENGTH : 2 * LENGTH]  # nearly constant: H is near 0
    entropy = spectral_entropy(x)
    tau = {0.0: 1.0, 1.0: 0.0}.get(share, float(entropy.quantile(1 - share)))
    router: dict[str, Any] = {"kind": kind, "tau": tau}
    if kind == "random":
        router = {"kind": kind, "attention_share": share}
    router |= fields.pop("router", {})
    config = small_model_config(hidden_size=d, router=router, dropout=dropout, **fields)
    layer = build_layer(config, LAYER, SINGLE_RANK)
    initialise(layer, config, 0, SINGLE_RANK, prefix=f"layers.{LAYER}")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    tokens = torch.randint(4, (SEQUENCES, LENGTH), generator=generator)
    layout = lay_out(
        config,
        torch.arange(SEQUENCES),
        LENGTH,
        tokens=tokens,
        document_end=END if documents else None,
        dropout_seed=7,
    )
    return layer.to(dtype).train(), x.to(dtype).requires_grad_(), layout


def results(layer: RoutedLayer, x: torch.Tensor, layout: BatchLayout) -> dict[str, torch.Tensor]:
    """Return hidden states and all gradients of a layer."""
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    x.grad = None
    layer.zero_grad()
    output = layer(x, layout, None, None)
    added = 0 if output.regulariser is None else output.regulariser
    ((output.hidden_states * direction).sum() + added).backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"hidden states": output.hidden_states.detach(), "x": x.grad, **gradients}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float) -> None:
    """Check numbers relative to the greatest one that is expected, or to 1."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] is not None and value is not None, name
        deviation = (found[name] - value).abs().max() / value.abs().max().clamp_min(1)
        assert deviation <= within, (name, float(deviation))


CASES: dict[str, dict[str, Any]] = {
    "share 0": {"share": 0.0},
    "share 0.1": {"share": 0.1},
    "share 0.5": {},
    "share 1": {"share": 1.0},
    "random": {"kind": "random"},
    "hashed": {"kind": "hashed"},
    "regularised": {"router": {"collapse_weight": 0.3}},
    "of a share": {"router": {"target_share": 0.4}},
    "documents": {"documents": True},
    "dropout": {"dropout": 0.2},
    "dropout, documents": {"dropout": 0.2, "documents": True},
    "dropout, documents, share 0.1": {"dropout": 0.2, "documents": True, "share": 0.1},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm", ("post", "pre"))
@pytest.mark.parametrize("keys", ("all", "routed"))
def test_static_shapes_give_the_same_hidden_states_and_gradients(case, norm, keys, monkeypatch):
    """A weight that no row needs has a gradient of zeros. Rows that are not written are NaN on a CPU: none is read."""
    layer, x, layout = static_case(norm=norm, attention={"keys": keys}, **CASES[case])
    expected, routes = results(layer, x, layout), layer.last_routes
    layer.has_static_shapes = True
    with NoWait(), monkeypatch.context() as patch:
        for name in COPIES:
            patch.setattr(torch.Tensor, name, refuse)
        patch.setattr(torch.Tensor, "to", without_device(torch.Tensor.to))
        found = results(layer, x, layout)
    assert layer.last_routes.equal(routes)
    assert_same(found, {name: torch.zeros_like(found[name]) if v is None else v for name, v in expected.items()}, 1e-12)


def test_padding_counts_in_no_statistic():
    layer, x, layout = static_case(kind="random", router={"seed": 3}, norm="pre")
    layout = layout.with_lengths(torch.tensor([LENGTH, 5, 9]))
    expected, found = results(layer, x, layout), {}
    plain = statistics([layer(x, layout, None, None)], layout, x.device)
    layer.has_static_shapes = True
    with NoWait():
        found = results(layer, x, layout)
    assert_same(found, expected, 1e-12)
    static = statistics([layer(x, layout, None, None)], layout, x.device)
    for one, other in zip(static, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, equal_nan=True)


COMPILED = [
    ("share 0.5", "post", "all"),
    ("random", "pre", "routed"),
    ("hashed, dropout", "pre", "all"),
    ("random, dropout, documents", "post", "routed"),
    ("hashed, documents", "post", "routed"),
    ("dropout, documents", "pre", "routed"),
    ("of a share", "post", "all"),
    ("regularised", "pre", "routed"),
]
"""Cases of a layer, the place of its norm and its keys, in which each pair of two meets."""
ALL_COMPILED = [
    (", ".join((kind, *drops, *has_documents)), norm, keys)
    for kind in ("share 0.5", "random", "hashed", "of a share")
    for drops in ((), ("dropout",))
    for has_documents in ((), ("documents",))
    for norm in ("post", "pre")
    for keys in ("all", "routed")
]
OTHERS_COMPILED = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL_COMPILED if case not in COMPILED]


@pytest.mark.parametrize(("case", "norm", "keys"), [*COMPILED, *OTHERS_COMPILED])
def test_a_compiled_layer_is_one_graph_for_all_routes(case, norm, keys):
    torch._dynamo.reset()
    counters.clear()
    fields = {key: value for name in case.split(", ") for key, value in CASES[name].items()}
    layer, x, layout = static_case(norm=norm, attention={"keys": keys}, **fields)
    expected, routes = results(layer, x, layout), layer.last_routes
    layer.has_static_shapes = True
    compile_layers(layer, "aot_eager", has_documents=layout.document_starts is not None)
    found = results(layer, x, layout)
    assert layer.last_routes.equal(routes)
    assert_same(found, expected, 1e-12)
    graphs = counters["stats"]["unique_graphs"]
    other = x.detach().flip(0).requires_grad_()  # other routes
    found = results(layer, other, layout)
    layer.has_static_shapes = False
    assert_same(found, results(layer, other, layout), 1e-12)
    assert not counters["graph_break"]
    assert graphs == counters["stats"]["unique_graphs"] == 1


MODELS = {
    "threshold": {},
    "keys of routed, pre": {"attention": {"keys": "routed"}, "norm": "pre"},
    "per layer": {"router": {"tau": (0.74, 0.83, 0.79)}},
    "hashed, regularised": {"router": {"kind": "hashed", "tau": MIDDLE, "collapse_weight": 0.3}},
    "random": {"router": {"kind": "random", "attention_share": 0.4, "seed": 5}},
}


@pytest.mark.parametrize("interval", (None, 1, 3))
@pytest.mark.parametrize("case", MODELS)
def test_a_model_of_static_shapes_learns_and_reports_the_same(case, interval):
    """Recomputed activations take the routes of the first pass."""
    config = small_model_config(dropout=0.1, num_layers=5, **MODELS[case])
    plain, static = (lively_model(config).train() for _ in range(2))
    use_static_shapes(static)
    for model in (plain, static):
        model.checkpoint_interval, model.document_end = interval, 3
    tokens, outputs = token_batch(length=13), []
    for model in (plain, static):
        outputs.append(model(tokens[:, :-1], tokens[:, 1:]))
        (outputs[-1].loss + outputs[-1].regulariser).backward()
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=0, atol=1e-12)
    for found, expected in zip(outputs[1].statistics, outputs[0].statistics, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7, equal_nan=True)
    for (name, one), other in zip(plain.named_parameters(), static.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-12, msg=name)


def test_parts_can_be_compiled_within_static_shapes():
    config = small_model_config(dropout=0.1)
    plain, compiled = (lively_model(config).train() for _ in range(2))
    use_static_shapes(compiled)
    compile_layers(compiled, "aot_eager", has_documents=False)
    tokens = token_batch(length=13)
    for model in (plain, compiled):
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-12, msg=name)


def test_routes_that_are_given_are_taken():
    config = small_model_config()
    model, tokens, recorded = lively_model(config).eval(), token_batch(), {}
    model(tokens, routes=recorded)
    flipped = {name: 1 - routes for name, routes in recorded.items()}
    expected = model(tokens, routes=dict(flipped)).logits
    use_static_shapes(model)
    torch.testing.assert_close(model(tokens, routes=dict(flipped)).logits, expected, rtol=0, atol=1e-12)
    written: dict[str, torch.Tensor] = {}
    model(tokens, routes=written)
    assert all(written[name].equal(routes) for name, routes in recorded.items())
