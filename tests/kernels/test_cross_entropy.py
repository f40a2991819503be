"""The head's cross-entropy in chunks against PyTorch's over all logits."""

from __future__ import annotations

import ast
import json
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from loss_memory_worker import CHUNK_BYTES, DTYPES, SHAPES, measure
from support import ROOT, WORKERS, python

from megachiar.kernels import cross_entropy as module
from megachiar.kernels.cross_entropy import linear_cross_entropy
from megachiar.kernels.ignored_target import IGNORED_TARGET

ROWS, D, VOCABULARY = 11, 6, 17


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = noise(ROWS, D).to(dtype), noise(VOCABULARY, D, seed=1).to(dtype)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(2))
    targets[[0, 4, 5]] = IGNORED_TARGET
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.fixture(params=[1, 4, 5, ROWS, 1000], ids=lambda n: f"{n}rows")
def chunk_rows(request, monkeypatch):
    """Rows of a chunk: one, a divisor of nothing, all, more than all."""
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 4 * VOCABULARY * request.param)


def test_loss_and_gradients_are_pytorchs(chunk_rows):
    hidden, weight, targets = problem()
    loss, token_losses = linear_cross_entropy(hidden, weight, targets)
    each = F.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORED_TARGET)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED_TARGET)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(token_losses, each.detach(), rtol=0, atol=1e-13)
    assert not token_losses.requires_grad
    for g, e in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_logits_with_spare_columns_give_the_same(monkeypatch, dtype):
    """As a vocabulary of some thousand gets them: here every row is taken for a whole page."""
    monkeypatch.setattr(module, "PAGE", dtype.itemsize)
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 4)
    hidden, weight, targets = problem(dtype)
    assert module._logits(hidden.detach(), weight.detach()).shape == (ROWS, VOCABULARY + module.SPARE)
    loss, token_losses = linear_cross_entropy(hidden, weight, targets)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    each = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none", ignore_index=IGNORED_TARGET)
    expected = each.sum() / (targets != IGNORED_TARGET).sum()
    near = {"rtol": 0, "atol": 1e-13 if dtype == torch.float64 else 1e-5, "check_dtype": False}
    torch.testing.assert_close(token_losses, each.detach(), **near)
    gradients = zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact), strict=True)
    for gradient, wanted in gradients:
        torch.testing.assert_close(gradient, wanted, **near)


def test_a_target_of_another_part_is_not_taken_from_a_spare_column(monkeypatch):
    """Ids of the second part are numbers of the first one's spare columns. The parts' gradients add up to the whole."""
    monkeypatch.setattr(module, "PAGE", torch.float64.itemsize)
    hidden, weight, targets = problem()
    whole = linear_cross_entropy(hidden, weight, targets)
    logits = (hidden @ weight.T).detach()
    at_target = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]

    class Part(NamedTuple):
        first: int

        def merge(self, scale, target):
            inside = (targets >= self.first) & (targets < self.first + len(rows))
            torch.testing.assert_close(target, at_target.where(inside, 0.0), rtol=0, atol=1e-13)
            return logits.logsumexp(1), at_target

    gradients = []
    for first, rows in ((0, weight[:8]), (8, weight[8:])):
        loss, token_losses = linear_cross_entropy(hidden, rows, targets, Part(first))
        torch.testing.assert_close(token_losses, whole.token_losses, rtol=0, atol=1e-13)
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    expected = torch.autograd.grad(whole.loss, (hidden, weight))
    for parts, wanted in zip(zip(*gradients, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(parts), wanted, rtol=0, atol=1e-13)


def test_gradcheck(chunk_rows):
    hidden, weight, targets = problem()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets).loss, (hidden, weight))


def test_without_a_target_that_counts_loss_and_gradients_are_zero(chunk_rows):
    hidden, weight, targets = problem()
    loss, token_losses = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED_TARGET))
    loss.backward()
    assert loss == 0 and not token_losses.any()
    assert not hidden.grad.any() and not weight.grad.any()


def test_without_rows_the_weight_still_gets_a_gradient():
    weight = noise(VOCABULARY, D).requires_grad_()
    loss, token_losses = linear_cross_entropy(noise(0, D), weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and token_losses.shape == (0,) and not weight.grad.any()


def test_inference_computes_no_gradients():
    hidden, weight, targets = problem()
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_smaller_types_are_near_the_wide_ones(chunk_rows, dtype):
    hidden, weight, targets = problem(dtype)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss, token_losses = linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets, ignore_index=IGNORED_TARGET)
    assert loss.dtype == token_losses.dtype == torch.float32
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    loss.backward()
    expected.backward()
    for got, want in zip((hidden, weight), wide, strict=True):
        assert got.grad.dtype == dtype
        assert (got.grad.double() - want.grad).norm() < tolerance * want.grad.norm()


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight, targets = problem(torch.float32)
    loss, _ = linear_cross_entropy(hidden * 1000, weight, targets)
    expected = F.cross_entropy(1000 * hidden.double() @ weight.double().T, targets, ignore_index=IGNORED_TARGET)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_fp16_gradients_survive_a_loss_scale_over_many_rows():
    """The factor 1 / rows comes last: a slope of 1e-3 over 4096 rows is below fp16's smallest number."""
    hidden, weight = noise(4096, D, scale=0.01).half().requires_grad_(), noise(VOCABULARY, D, seed=1).half()
    targets = torch.zeros(4096, dtype=torch.long)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    (loss * 2**14).backward()
    wide = hidden.detach().double().requires_grad_()
    (F.cross_entropy(wide @ weight.double().T, targets) * 2**14).backward()
    assert (hidden.grad.double() - wide.grad).norm() < 5e-3 * wide.grad.norm()


def check_bytes(counted: int, formula: int, rows: int) -> None:
    """The formula leaves out what is one number a row: a few of them of 8 bytes."""
    assert formula <= counted <= formula + 64 * (rows + 1), f"{counted / formula:.3f} of what the formula says"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_is_what_the_plan_counts(monkeypatch, shape, dtype):
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", CHUNK_BYTES)
    check_bytes(*measure(*shape, dtype, by_triton=False), shape[0])


@pytest.mark.parametrize("rows", (1, 1024, 3000))
def test_memory_of_whole_chunks_is_what_the_plan_counts(rows):
    """With the limits of a run: 2048 rows of this vocabulary are a chunk."""
    check_bytes(*measure(rows, 8, 4096, torch.float32, by_triton=False), rows)


def test_memory_of_the_triton_kernels_is_what_the_plan_counts():
    pytest.importorskip("triton")
    done = python(WORKERS / "loss_memory_worker.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(SHAPES) * len(DTYPES)
    for shape in SHAPES:
        for dtype in DTYPES:
            check_bytes(*found[f"{shape} {dtype}"], shape[0])


def test_the_ignored_target_is_written_in_one_place():
    """Readers of data, the engine and the loss must agree on it, so that nobody writes the number himself."""
    written = set()
    for path in (ROOT / "megachiar").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.UnaryOp) and ast.unparse(node) == str(IGNORED_TARGET):
                written.add(path.name)
    assert written == {"ignored_target.py"}
