"""Time keyed dropout and torch's own, forward and backward, in turn in one process.

    megachiar bench-dropout --threads 2

It prints times and their ratio, medians with quartiles: below 1 keyed dropout is faster. Attention is compared with
``scaled_dot_product_attention(dropout_p=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from megachiar.benchmark import measure_interleaved, timed
from megachiar.kernels.attention import causal_attention
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.dropout import KeyedDropout, apply_dropout, row_keys
from megachiar.options import CommandParser

PROBABILITY = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser("bench-dropout", __doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="times each is measured (%(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((2048, 1024), (4096, 4096)):
            bench_rows(rows, columns, dtype, device, options.rounds)
        for length in (256, 1024):
            bench_attention(8, 4, length, 64, dtype, device, options.rounds)
    return 0


def bench_rows(n: int, m: int, dtype: torch.dtype, device: torch.device, rounds: int) -> None:
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
