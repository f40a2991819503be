"""Compare the kernels that work row by row with their definitions in float64, and print the deviations as JSON.

    python triton_rows_worker.py cpu|cuda          on a CPU with TRITON_INTERPRET=1

The functions are those that a model calls, made to take the kernels. ``tests/kernels/test_triton.py`` starts it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from recorded_launches import record_launches

from megachiar.kernels import dct, gpu, triton_cross_entropy, triton_factored, triton_norm, triton_permute, triton_rope
from megachiar.kernels.cross_entropy import linear_cross_entropy
from megachiar.kernels.ignored_target import IGNORED_TARGET
from megachiar.kernels.norm import add_and_norm
from megachiar.kernels.permute import permute, unpermute
from megachiar.kernels.rope import keys_and_values, rotary_table, rotate
from megachiar.kernels.spectral import mix_add_and_norm, spectral_mix, spectrum_and_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = ((0, 256), (1, 512), (5, 192), (37, 256))
LAUNCHERS = (
    (triton_factored, "_entropy"),
    (triton_norm, "_norm"),
    (triton_norm, "_norm_backward"),
    (triton_permute, "_scatter"),
    (triton_rope, "_rotate"),
    (triton_cross_entropy, "_read"),
    (triton_cross_entropy, "_slope"),
)

Found = dict[str, dict[str, float]]


def main() -> None:
    device, launched = torch.device(sys.argv[1]), record_launches(LAUNCHERS)
    gpu.has_kernels, dct.FFT_FROM = lambda _: True, 10**9
    found: Found = {}
    for name, dtype in DTYPES.items():
        for n, d in SIZES:
            case = f"{n} rows of {d}"
            found[f"{name}: entropy of {case}"] = entropy(n, d, dtype, device)
            found[f"{name}: mixing of {case}"] = mixing(n, d, dtype, device, normed=False)
            found[f"{name}: mixing and norm of {case}"] = mixing(n, d, dtype, device, normed=True)
            for added in (False, True):
                found[f"{name}: norm of {case}, added {added}"] = norm(n, d, dtype, device, added)
        found[f"{name}: norm of 4 rows of 100"] = norm(4, 100, dtype, device, True)
        found[f"{name}: rows permuted and back"] = permuted_and_back(dtype, device)
        for heads, c in ((1, 2), (3, 6), (4, 16)):
            found[f"{name}: rotation, {heads} heads of {c}"] = rotation(heads, c, dtype, device)
        for rows, vocabulary in ((1, 5), (9, 64), (9, 151)):
            for ignored in (False, True):
                case = f"{name}: loss of {rows} rows, {vocabulary} tokens, ignored {ignored}"
                found[case] = loss(rows, vocabulary, dtype, device, ignored)
    missing = {name for _, name in LAUNCHERS} - launched
    assert not missing, missing
    print(json.dumps(found))


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(d: int) -> torch.Tensor:
    return torch.from_numpy(scipy.fft.dct(np.eye(d), axis=0, norm="ortho"))


def entropy(n: int, d: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    x = noise(n, d, seed=d, dtype=dtype)
    if n > 2:
        x[0], x[1] = 0, 1  # no power at all; all of it at frequency zero
    deviations = {}
    for dc_weight, epsilon in ((1.0, 0.0), (2.0, 0.0), (2.0, 1e-3)):
        _, entropy = spectrum_and_entropy(x.to(device), dc_weight, epsilon)
        power = (2 * x.double() @ matrix(d).T).square()  # the transform and the epsilons of the published code
        power[:, 0] *= dc_weight
        p = power / (power.sum(-1, keepdim=True) + epsilon).clamp_min(1e-300)
        h = -(p * (p.clamp_min(1e-300) + epsilon).log()).sum(-1) / (np.log(d) + epsilon)
        assert entropy.dtype == torch.float32
        deviations[f"H {dc_weight} {epsilon}"] = relative(entropy, h)
    return deviations


def mixing(n: int, d: int, dtype: torch.dtype, device: torch.device, normed: bool) -> dict[str, float]:
    names = ("x", "filters", "weight", "bias")[: 4 if normed else 2]
    values = (noise(n, d, seed=1), 1 + noise(d, seed=2), 1 + noise(d, seed=3), noise(d, seed=4))
    c = matrix(d)

    def definition(x, filters, *norm):
        mixed = 0.7 * (x @ c.T * filters) @ c
        return F.layer_norm(x + mixed, (d,), *norm, 1e-5) if norm else mixed

    def kernels(x, filters, *norm):
        return mix_add_and_norm(x, filters, 0.7, None, *norm, 1e-5) if norm else spectral_mix(x, filters, 0.7)

    return compared(kernels, definition, dict(zip(names, values, strict=False)), dtype, device)


def norm(n: int, d: int, dtype: torch.dtype, device: torch.device, added: bool) -> dict[str, float]:
    inputs = {"x": noise(n, d, seed=1), "weight": 1 + noise(d, seed=2), "bias": noise(d, seed=3)}
    if added:
        inputs["branch_output"] = noise(n, d, seed=4)

    def definition(x, weight, bias, branch_output=None):
        return F.layer_norm(x if branch_output is None else x + branch_output, (d,), weight, bias, 1e-5)

    def kernels(x, weight, bias, branch_output=None):
        return add_and_norm(x, branch_output, weight, bias, 1e-5)

    return compared(kernels, definition, inputs, dtype, device)


def rotation(heads: int, c: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return the deviations of rotating rows in place with tables that repeat over sequences, and of single rows."""
    both = noise(2, 5, 2, heads, c, seed=1)
    exact = rotary_table(9, c, 10000.0, torch.device("cpu"), torch.float64)
    rounded = [table.to(device) for table in rotary_table(9, c, 10000.0, torch.device("cpu"), dtype)]
    of_rows = torch.tensor([4, 0, 8, 8, 2, 1, 7, 3, 5, 6])

    def turned(x, cos, sin):
        lead, rest = x[..., : c // 2], x[..., c // 2 :]
        cos, sin = cos[..., : c // 2], sin[..., c // 2 :]
        return torch.cat([lead * cos - rest * sin, rest * cos + lead * sin], -1)

    def together(turn, tables):
        cos, sin = tables
        rows = of_rows.to(cos.device)

        def function(x):
            first, second = x.unbind(2)
            by_position = turn(first, cos[2:7, None], sin[2:7, None])
            by_row = turn(second.flatten(0, 1), cos[rows][:, None], sin[rows][:, None])
            if turn is rotate:
                keys, values = keys_and_values(x.clone(), cos[2:7, None], sin[2:7, None])
            else:
                keys, values = by_position, second
            return torch.cat([y.flatten(0, -3) for y in (by_position, by_row, keys, values)])

        return function

    tables = [table.to(dtype).double() for table in exact]
    return compared(together(rotate, rounded), together(turned, tables), {"x": both}, dtype, device)


def permuted_and_back(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    order, sizes = torch.randperm(11, generator=torch.Generator().manual_seed(1)), (4, 0, 7)

    def kernels(x):
        parts = permute(x, order.to(device), sizes)
        return unpermute([part * (i + 1) for i, part in enumerate(parts)], order.to(device))

    def definition(x):
        factor = torch.empty(11, dtype=x.dtype)
        factor[order] = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype).repeat_interleave(torch.tensor(sizes))
        return x * factor[:, None]

    return compared(kernels, definition, {"x": noise(11, 100, seed=1)}, dtype, device)


class Half:
    """The part of a vocabulary from token ``first``; the sums over the tokens before it, of another rank, are given."""

    def __init__(self, first: int, scale: torch.Tensor, target: torch.Tensor):
        self.first, self.scale, self.target = first, scale, target

    def merge(self, scale: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.logaddexp(scale, self.scale.to(scale)), target + self.target.to(target)


def loss(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, ignored: bool) -> dict[str, float]:
    inputs = {"hidden": noise(rows, 16, seed=1), "weight": noise(vocabulary, 16, seed=2)}
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    if ignored:
        targets[::3] = IGNORED_TARGET

    def kernels(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets.to(device)).loss

    def definition(hidden, weight):
        counted = (targets != IGNORED_TARGET).sum().clamp_min(1)
        each = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED_TARGET, reduction="sum")
        return each / counted

    deviations = compared(kernels, definition, inputs, dtype, device)
    first = vocabulary // 2
    hidden, weight = (x.to(dtype).double() for x in inputs.values())
    before = (hidden @ weight.T)[:, :first]
    inside = (targets >= 0) & (targets < first)
    at_target = before.gather(1, targets.clamp(0, first - 1)[:, None])[:, 0].masked_fill(~inside, 0)
    part = Half(first, before.logsumexp(1).to(device), at_target.to(device))

    def of_part(hidden, weight):
        return linear_cross_entropy(hidden, weight[first:], targets.to(device), part).loss

    whole = [x.clone().requires_grad_() for x in (hidden, weight)]
    definition(*whole).backward()
    own = [x.to(device, dtype).requires_grad_() for x in inputs.values()]
    result = of_part(*own)
    result.backward()
    deviations["part's loss"] = relative(result, definition(hidden, weight))
    return deviations | {"part's weight": relative(own[1].grad[first:], whole[1].grad[first:])}


def compared(
    kernels: Callable, definition: Callable, inputs: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Return the deviations of the result and of the gradients, for inputs rounded to ``dtype``."""
    exact = {name: x.to(dtype).double().requires_grad_() for name, x in inputs.items()}
    own = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    expected, got = definition(*exact.values()), kernels(*own.values())
    direction = noise(*expected.shape, seed=9).to(dtype)
    of_expected = torch.autograd.grad((expected * direction.double()).sum(), list(exact.values()))
    of_got = torch.autograd.grad(got, list(own.values()), direction.to(device, got.dtype))
    deviations = {"result": relative(got, expected)}
    for name, one, other in zip(inputs, of_got, of_expected, strict=True):
        assert one.dtype == dtype
        deviations[name] = relative(one, other)
    return deviations


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    if want.numel() == 0:
        assert got.shape == want.shape
        return 0.0
    return ((got.detach().cpu().double() - want.detach()).abs().max() / want.abs().max().clamp_min(1.0)).item()


if __name__ == "__main__":
    main()
