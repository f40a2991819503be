"""Compare the kernels of a layer of static shapes with their definitions in float64, and print the deviations as JSON.

    python triton_partition_worker.py cpu|cuda          on a CPU with TRITON_INTERPRET=1

The definitions are the CPU's own way through the same operations. What an operation is not to read is NaN, and so is
memory that nothing was written to: ``tests/kernels/test_triton.py``, which starts this, finds a NaN in a result.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator

import torch
from recorded_launches import record_launches

from megachiar.config.model import ModelConfig
from megachiar.kernels import (
    gpu,
    partition,
    partitioned_attention,
    rope,
    routed_norm,
    row_products,
    triton_attention,
    triton_dropout,
    triton_norm,
    triton_partition,
    triton_rope,
    triton_row_products,
)
from megachiar.kernels.dropout import row_keys
from megachiar.kernels.spectral import spectral_entropy
from megachiar.model.batch_layout import BatchLayout, DropoutKeys, lay_out
from megachiar.model.init import initialise
from megachiar.model.layer_stack import build_layer
from megachiar.topology import SINGLE_RANK

SEQUENCES, LENGTH = 3, 20
N = SEQUENCES * LENGTH
SHARES = {"fp32": {"all": 1.0, "none": 0.0, "half": 0.5}, "bf16": {"few": 0.1}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAUNCHERS = (
    (triton_attention, "_forward"),
    (triton_attention, "_backward_queries"),
    (triton_attention, "_backward_keys"),
    (triton_dropout, "_halves"),
    (triton_norm, "_norm"),
    (triton_norm, "_norm_backward"),
    (triton_partition, "_partition"),
    (triton_rope, "_rotate_both"),
    (triton_row_products, "_products"),
    (triton_row_products, "_weights"),
)

LAYERS = (
    ("all", "post", False, False),
    ("routed", "pre", True, True),
    ("all", "pre", False, True),
    ("routed", "post", True, False),
)
"""Whole layers: which keys, which norm, whether there is dropout, and whether there are documents."""

Tensor = torch.Tensor
Outputs = dict[str, tuple[Tensor, Tensor | None]]
"""Results by name, each with which of its rows (N,) are written; None if all are."""


def main() -> None:
    device, launched = torch.device(sys.argv[1]), record_launches(LAUNCHERS)
    torch.use_deterministic_algorithms(True)  # fills what is empty with NaN
    found = dict(partitions(device))
    for name, dtype in DTYPES.items():
        for of_routes, share in SHARES[name].items():
            by = partition_of(share)
            for case, run in cases(by):
                found[f"{name}: {case}, {of_routes}"] = compared(run, by, dtype, device)
    for keys, norm, dropped, documents in LAYERS:
        case = f"layer: routed keys {keys == 'routed'}, {norm}, dropout {dropped}, documents {documents}"
        found[case] = layer_deviations(keys, norm, dropped, documents, device)
    missing = {name for _, name in LAUNCHERS} - launched
    assert not missing, missing
    print(json.dumps(found))


def partition_of(share: float) -> partition.Partition:
    """Return a partition of rows on a CPU; with a share below 1 the second sequence has no attention row."""
    score = torch.rand(N, generator=torch.Generator().manual_seed(3))
    if share < 1:
        score[LENGTH : 2 * LENGTH] = 0
    return partition.partition(score, torch.tensor([1 - share if share else 2.0]), SEQUENCES)


def partitions(device: torch.device) -> Iterator[tuple[str, dict[str, float]]]:
    """Compare partitions, which are integers."""
    score = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for name, values in (("fp32", score.float()), ("fp64", score), ("routes", (score > 0.4).long())):
        for bound in (0.5, None, 2.0, 0.7):
            threshold = None if bound is None else torch.tensor([bound])
            expected = partition.partition(values, threshold, SEQUENCES)
            with kernels():
                got = partition.partition(values.to(device), None if bound is None else threshold.to(device), SEQUENCES)
            case = f"fp32: partition of {name}, {bound}"
            yield (
                case,
                {
                    field: float((one.cpu() != other).sum())
                    for field, one, other in zip(got._fields, got, expected, strict=True)
                },
            )


class kernels:
    """Within this context the operations launch their kernels."""

    def __enter__(self) -> None:
        self.kept = gpu.has_kernels
        gpu.has_kernels = lambda _: True

    def __exit__(self, *_) -> None:
        gpu.has_kernels = self.kept


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def known(x: Tensor, rows: Tensor) -> Tensor:
    """Return ``x`` with NaN in place of the rows that are not among ``rows`` (N,) bool."""
    return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, torch.nan)


Case = tuple[str, Callable[[Callable[[Tensor], Tensor]], Outputs]]


def cases(by: partition.Partition) -> Iterator[Case]:
    """Return the operations by name: each is run with a function that gives its inputs another type and device."""
    leads, attends = by.is_attention(), by.routes > 0
    yield from products(by, leads, attends, d=96, o=160)
    yield from norms(by, attends, d=100)
    for h, c in ((2, 16), (3, 64)):
        yield from rotations(by, leads, h, c)
    for keys in ("all", "routed"):
        for dropped, documents in ((False, False), (True, False), (False, True), (True, True)):
            yield attention(by, leads, keys == "routed", dropped, documents)


def products(by: partition.Partition, leads: Tensor, attends: Tensor, d: int, o: int) -> Iterator[Case]:
    x, weight, bias, matrix = noise(N, d, seed=1), noise(o, d, seed=2), noise(o, seed=3), noise(d, d, seed=4)
    of_product, of_mixed = known(noise(N, o, seed=5), leads), known(noise(N, d, seed=6), ~attends)

    def forward(to):
        product, mixed = row_products.input_products(*map(to, (x, weight, bias, matrix, by.order, by.starts)))
        return {"product": (product, leads), "mixed": (mixed, ~attends)}

    def backward(to):
        results: Outputs = {}
        for name, addend in (("alone", None), ("added", to(x))):
            inputs = map(to, (weight, matrix, by.order, by.starts))
            gradient = row_products.input_products_backward(to(of_product), to(of_mixed), addend, *inputs)
            results[name] = gradient, None
        gradients = row_products.input_products_weights_backward(
            *map(to, (of_product, of_mixed, x, by.order, by.starts))
        )
        return results | dict(zip(("weight", "bias", "matrix"), ((g, None) for g in gradients), strict=True))

    def output(to):
        inputs = [to(y).requires_grad_() for y in (known(x, leads), weight, bias)]
        result = row_products.output_product(*inputs, to(by.order), to(by.starts))
        gradients = torch.autograd.grad(result, inputs, to(of_attended))
        named = {"output": (result.detach(), attends), "x": (gradients[0], leads)}
        return named | {name: (g, None) for name, g in zip(("weight", "bias"), gradients[1:], strict=True)}

    of_attended = known(noise(N, o, seed=7), attends)
    yield "input products", forward
    yield "gradients of input products", backward
    yield "output product", output


def norms(by: partition.Partition, attends: Tensor, d: int) -> Iterator[Case]:
    rows = noise(N, d, seed=1), known(noise(N, d, seed=2), attends), known(noise(N, d, seed=3), ~attends)
    parameters = [offset + noise(d, seed=4 + i) for i, offset in enumerate((1, 0, 1, 0))]

    def norm(added: bool):
        def run(to):
            x, *branches = (to(y).requires_grad_() for y in rows)
            weights = [to(p).requires_grad_() for p in parameters]
            pairs = [routed_norm.NormParameters(*weights[:2]), routed_norm.NormParameters(*weights[2:])]
            given = tuple(branches) if added else None
            result = routed_norm.add_and_norm_by_route(x, given, to(by.routes), *pairs, 1e-5)
            inputs = [x, *(branches if added else ()), *weights]
            gradients = torch.autograd.grad(result, inputs, to(noise(N, d, seed=9)))
            return {"output": (result.detach(), None)} | {str(i): (g, None) for i, g in enumerate(gradients)}

        return run

    yield "norm", norm(False)
    yield "addition and norm", norm(True)


def rotations(by: partition.Partition, leads: Tensor, h: int, c: int) -> Iterator[Case]:
    tables = LENGTH, LENGTH + 3, 10000.0
    q, kv, qkv = (noise(N, parts, h, c, seed=parts) for parts in (1, 2, 3))

    def rotate(keys_are_routed: bool, back: bool):
        def run(to):
            heads = to(known(qkv if keys_are_routed else q, leads)).clone()
            both = None if keys_are_routed else to(kv).clone()
            rope.rotate_by_partition(heads, both, to(by.order), to(by.starts), *tables, back)
            return {"heads": (heads, leads)} | ({} if both is None else {"keys": (both, None)})

        return run

    def all_rows(to):
        inputs = [to(x).clone().requires_grad_() for x in (q[:, 0], kv)]
        results = rope.rotated_rows(*(x.clone() for x in inputs), *tables)
        # As a kernel of attention gives them: heads before positions.
        directions = [to(noise(SEQUENCES, h, LENGTH, c, seed=i)).transpose(1, 2) for i in range(3)]
        gradients = torch.autograd.grad(results, inputs, directions)
        return {str(i): (y.detach().flatten(0, 1) if i < 3 else y, None) for i, y in enumerate((*results, *gradients))}

    for back in (False, True):
        yield f"rotation, {h} heads of {c}, back {back}", rotate(False, back)
        yield f"rotation of routed keys, {h} heads of {c}, back {back}", rotate(True, back)
    yield f"rotation of all rows, {h} heads of {c}", all_rows


def attention(by: partition.Partition, leads: Tensor, keys_are_routed: bool, dropped: bool, documents: bool) -> Case:
    h, c = 2, 16
    heads = known(noise(N, 3 if keys_are_routed else 1, h, c, seed=1), leads)
    kv = None if keys_are_routed else noise(N, 2, h, c, seed=2)
    gradient = known(noise(N, h, c, seed=3), leads)
    position = torch.arange(LENGTH).repeat(SEQUENCES)
    first = torch.arange(N) - position
    firsts, ends = first + position // 7 * 7, first + (position // 7 * 7 + 7).clamp_max(LENGTH)
    bounds = [firsts.int(), ends.int()] if documents else [None, None]
    keys = row_keys(3, torch.arange(SEQUENCES)[:, None], torch.arange(LENGTH)).flatten() if dropped else None

    def run(to):
        inputs = [None if x is None else to(x) for x in (heads, kv, *by, *bounds, keys)]
        output, sums = partitioned_attention.attend(*inputs, 0.25, 5)
        gradients = partitioned_attention.attend_backward(to(gradient), output, sums, *inputs, 0.25, 5)
        results: Outputs = {"output": (output, leads), "heads": (gradients[0], leads)}
        if not keys_are_routed:
            results["keys and values"] = gradients[1], None
        return results

    return f"attention, routed keys {keys_are_routed}, dropout {dropped}, documents {documents}", run


def compared(
    run: Callable[[Callable[[Tensor], Tensor]], Outputs], by: partition.Partition, dtype: torch.dtype, device
) -> dict[str, float]:
    """Return how far the written rows of each result of the kernels deviate from those in float64."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double() if x.is_floating_point() else x

    def placed(x: Tensor) -> Tensor:
        return (x.to(dtype) if x.is_floating_point() else x).to(device)

    expected = run(rounded)
    with kernels():
        got = run(placed)
    return {name: deviation(got[name][0], *expected[name]) for name in expected}


def layer_deviations(keys: str, norm: str, dropped: bool, documents: bool, device: torch.device) -> dict[str, float]:
    """Return how far a layer of static shapes in fp32 deviates from one whose shapes follow the routes, in fp64."""
    x = noise(N, 256, seed=1)
    x[LENGTH : 2 * LENGTH] = 1 + 0.1 * x[LENGTH : 2 * LENGTH]  # no row of this sequence attends
    sizes = {"num_layers": 3, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 16, "norm": norm}
    router = {"router": {"tau": spectral_entropy(x).quantile(0.55).item()}, "attention": {"keys": keys}}
    rate = {"dropout": 0.2 if dropped else 0.0, "max_sequence_length": LENGTH}
    config = ModelConfig.model_validate(sizes | router | rate)
    tokens = torch.randint(4, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(2))
    of_rows = {"tokens": tokens, "document_end": 0 if documents else None, "dropout_seed": 7 if dropped else None}
    layout = lay_out(config, torch.arange(SEQUENCES), LENGTH, **of_rows)
    found = []
    for dtype, where in ((torch.float64, torch.device("cpu")), (torch.float32, device)):
        layer = build_layer(config, 1, SINGLE_RANK)
        initialise(layer, config, 0, SINGLE_RANK, prefix="layers.1")
        with torch.no_grad():
            for i, parameter in enumerate(layer.parameters()):
                parameter += 0.1 * noise(*parameter.shape, seed=i)
        layer, layer.has_static_shapes = layer.to(where, dtype).train(), dtype == torch.float32
        placed = BatchLayout(*(y.to(where) if torch.is_tensor(y) else y for y in layout))
        if placed.dropout_keys is not None:
            placed = placed._replace(dropout_keys=DropoutKeys(*(y.to(where) for y in placed.dropout_keys)))
        inputs = x.detach().clone().to(where, dtype).requires_grad_()
        with kernels() if layer.has_static_shapes else contextlib.nullcontext():
            result = layer(inputs, placed, None, None).hidden_states
            result.backward(noise(N, 256, seed=3).to(where, dtype))
        found.append({"hidden states": result, "x": inputs.grad} | {n: p.grad for n, p in layer.named_parameters()})
    return {name: deviation(found[1][name], expected, None) for name, expected in found[0].items()}


def deviation(got: Tensor, want: Tensor, written: Tensor | None) -> float:
    """Return the greatest deviation of the written rows, relative to the greatest number or 1."""
    got, want = got.detach().cpu().double(), want.detach()
    if written is not None:
        got, want = got[written], want[written]
    if want.numel() == 0:
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1)).item()


if __name__ == "__main__":
    main()
