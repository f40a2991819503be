"""Time keyed dropout and torch's own in turn, as ``megachiar bench-dropout`` says."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megachiar.benchmark import measure_interleaved, timed
from megachiar.kernels.attention import causal_attention
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.dropout import KeyedDropout, apply_dropout, row_keys

PROBABILITY = 0.1


def time_dropout(threads: int | None, rounds: int) -> None:
    """Measure and print; None leaves the number of CPU threads to torch."""
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((2048, 1024), (4096, 4096)):
            bench_rows(rows, columns, dtype, device, rounds)
        for length in (256, 1024):
            bench_attention(8, 4, length, 64, dtype, device, rounds)


def bench_rows(n: int, m: int, dtype: torch.dtype, device: torch.device, rounds: int) -> None:
    """Measure forward and backward of dropout over ``n`` rows of ``m`` channels: PyTorch's, and ours with keys."""
    x = torch.randn(n, m, device=device).to(dtype).requires_grad_()
    gradient = torch.randn(n, m, device=device).to(dtype)
    at = torch.arange(n, device=device)
    dropout = KeyedDropout(PROBABILITY, row_keys(1, at // 256, at % 256), 3)
    compare(
        f"rows ({n}, {m}) {dtype}",
        lambda: torch.autograd.grad(F.dropout(x, PROBABILITY), [x], gradient),
        lambda: torch.autograd.grad(apply_dropout(x, dropout), [x], gradient),
        device,
        rounds,
    )


def bench_attention(
    sequences: int, heads: int, length: int, size: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> None:
    """Measure forward and backward of causal attention with dropout: PyTorch's, and ours with keys."""
    shape = (sequences, heads, length, size)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    gradient = torch.randn(shape, device=device).to(dtype)
    sample_ids, positions = torch.arange(sequences, device=device), torch.arange(length, device=device)
    dropout = KeyedDropout(PROBABILITY, row_keys(1, sample_ids[:, None], positions).flatten(), 3)
    attend = F.scaled_dot_product_attention
    compare(
        f"attention {shape} {dtype}",
        lambda: torch.autograd.grad(attend(q, k, v, dropout_p=PROBABILITY, is_causal=True), [q, k, v], gradient),
        lambda: torch.autograd.grad(causal_attention(q, k, v, AttentionOptions(dropout)), [q, k, v], gradient),
        device,
        rounds,
    )


def compare(
    what: str, torchs: Callable[[], object], keyed: Callable[[], object], device: torch.device, rounds: int
) -> None:
    """Measure both in turn and print their times and the ratio."""
    times = measure_interleaved({"torch": timed(torchs, device), "keyed": timed(keyed, device)}, rounds)
    texts = {name: times.spread(name).format(" ms", 1e3) for name in times.seconds}
    ratio = times.speed_up("torch", over="keyed").format()
    print(f"{what:45} torch {texts['torch']:28} keyed {texts['keyed']:28} ratio {ratio}", flush=True)
