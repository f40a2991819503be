"""Count what a GPU would launch for a layer, forward and backward, and print the names as JSON.

    TRITON_INTERPRET=1 python launches_worker.py

There is no GPU: the layer runs on a CPU and takes the kernels, in Triton's interpreter. Each operation of torch that
computes or copies counts once, whatever it launches, and each kernel once. Views and allocations do not count, nor does
the sum that the backward pass begins with. ``tests/model/test_launches.py`` starts it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from megachiar.config.model import ModelConfig
from megachiar.kernels import gpu
from megachiar.kernels.spectral import filter_matrices
from megachiar.model.batch_layout import BatchLayout, lay_out
from megachiar.model.init import initialise
from megachiar.model.layer_stack import build_layer, statistics
from megachiar.topology import SINGLE_RANK

SEQUENCES, LENGTH, D = 2, 16, 256
FREE = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "alias", "detach", "lift_fresh", "unfold"),
    *("t", "transpose", "permute", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "unbind", "narrow"),
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
}
"""Operations that launch nothing."""
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "documents": {"documents": True},
}
LAYERS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "baseline"},
    "keys all": {"router": {"tau": 0.94}},
    "keys routed": {"router": {"tau": 0.94}, "attention": {"keys": "routed"}},
}


class Launches(TorchDispatchMode):
    """Notes each operation that a GPU would launch, those within the package's own operations included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "megachiar":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*arguments, **(named or {}))
        with self:  # an operation that others make up
            result = function.decompose(*arguments, **(named or {}))
        if result is not NotImplemented:
            return result
        if name not in FREE:
            self.names.append(name)
        return function(*arguments, **(named or {}))


@contextmanager
def counted_kernels(launches: Launches) -> Iterator[None]:
    """Let kernels run where there is no GPU, and note each launch."""
    launch, has_kernels = GridExecutor.__call__, gpu.has_kernels

    def note(executor: GridExecutor, *arguments, **named):
        launches.names.append(executor.fn.__name__)
        with _disable_current_modes():
            return launch(executor, *arguments, **named)

    GridExecutor.__call__, gpu.has_kernels = note, lambda _: True
    try:
        with launches:
            yield
    finally:
        GridExecutor.__call__, gpu.has_kernels = launch, has_kernels


def layer_and_layout(fields: dict[str, Any], documents: bool = False) -> tuple[torch.nn.Module, BatchLayout]:
    sizes = {"num_layers": 3, "hidden_size": D, "num_attention_heads": 4, "vocab_size": 16}
    config = ModelConfig.model_validate(sizes | {"max_sequence_length": LENGTH} | fields)
    layer = build_layer(config, 1, SINGLE_RANK)
    initialise(layer, config, 0, SINGLE_RANK, prefix="layers.1")
    tokens = torch.randint(4, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    seed = 7 if config.dropout else None
    gpu_layout = lay_out(
        config,
        torch.arange(SEQUENCES),
        LENGTH,
        tokens=tokens,
        document_end=0 if documents else None,
        dropout_seed=seed,
    )
    return layer.train(), gpu_layout.with_document_rows()


def launches_of(fields: dict[str, Any], documents: bool, is_static: bool) -> dict[str, list[str]]:
    """Return the names of what a layer launches in each pass, and for its statistics and its filter's matrix."""
    layer, layout = layer_and_layout(fields, documents)
    x = torch.randn(SEQUENCES * LENGTH, D, generator=torch.Generator().manual_seed(2))
    is_routed = hasattr(layer, "has_static_shapes")
    if is_routed:
        layer.has_static_shapes = is_static
    passes: dict[str, list[str]] = {}
    for _ in range(2):  # tables are made in the first one
        launches, inputs = Launches(), x.clone().requires_grad_()
        layer.zero_grad()
        with counted_kernels(launches):
            made = leaf = None
            if is_routed and is_static:
                made = filter_matrices(torch.stack([layer.dct.filter]), 1.0)[0]
                leaf = made.detach().requires_grad_()
            of_matrix = take(launches)
            output = layer(inputs, layout, None, None, leaf)
            passes["forward"] = take(launches)
            statistics([output._replace(hidden_states=None)], layout, x.device)
            passes["statistics"] = take(launches)
            direction = torch.ones_like(output.hidden_states)
            take(launches)
            output.hidden_states.backward(direction)
            passes["backward"] = take(launches)
            if made is not None and leaf is not None:
                made.backward(leaf.grad)
                passes["matrix"] = of_matrix + take(launches)
    return passes


def take(launches: Launches) -> list[str]:
    """Return what was noted, and forget it."""
    names = launches.names.copy()
    launches.names.clear()
    return names


def main() -> None:
    found = {}
    for case, fields in CASES.items():
        rest = {name: value for name, value in fields.items() if name != "documents"}
        for layer, of_layer in LAYERS.items():
            documents = fields.get("documents", False)
            found[f"{layer}, {case}"] = launches_of(of_layer | rest, documents, is_static=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
