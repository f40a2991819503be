"""A routed layer of static shapes: the numbers of the layer whose shapes follow the routes, and no wait of the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from model_cases import small_model_config
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from megachiar.kernels.spectral import spectral_entropy
from megachiar.model.batch_layout import BatchLayout, lay_out
from megachiar.model.init import initialise
from megachiar.model.layer import RoutedLayer
from megachiar.model.layer_stack import build_layer
from megachiar.topology import SINGLE_RANK

SEQUENCES, LENGTH, LAYER = 3, 12, 1
END = 0
"""The token that ends a document."""
WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "_unique", "item", "is_nonzero", "bincount", "equal")


class NoWait(TorchDispatchMode):
    """Fails where the host would wait for a GPU: where it asks for values, or for a shape that hangs on them.

    It also looks into the operations of the package, which a dispatcher sees as one each.
    """

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        namespace, _, name = function._schema.name.partition("::")
        assert name not in WAITS, name
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


def results(layer: RoutedLayer, x: torch.Tensor, layout: BatchLayout, call=None) -> dict[str, torch.Tensor]:
    """Return hidden states and all gradients of a layer."""
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    x.grad = None
    layer.zero_grad()
    output = (call or layer)(x, layout, None, None)
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
def test_static_shapes_give_the_same_hidden_states_and_gradients(case, norm, keys):
    """A weight that no row needs has a gradient of zeros. Rows that are not written are NaN on a CPU, so none is read."""
    layer, x, layout = static_case(norm=norm, attention={"keys": keys}, **CASES[case])
    expected, routes = results(layer, x, layout), layer.last_routes
    layer.has_static_shapes = True
    with NoWait():
        found = results(layer, x, layout)
    assert layer.last_routes.equal(routes)
    assert_same(found, {name: torch.zeros_like(found[name]) if v is None else v for name, v in expected.items()}, 1e-12)
