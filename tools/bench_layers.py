"""Time operators and whole layers side by side: routed against attention in every row, forward and backward.

    python tools/bench_layers.py --hidden-size 512 --sequence-length 256 1024 4096 16384

For each length: a routed layer at each ``--attention-share`` with keys of all tokens and of routed tokens alone,
against a layer whose rows all attend (``scaled_dot_product_attention``); then the operators by themselves. Each line is
one forward and backward pass, in turn with its rival; the speed-up is the median over rounds, with quartiles. Also what
autograd keeps of the forward pass, in MiB.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from megachiar import launch
from megachiar.benchmark import in_turn, machine, timed, write_json
from megachiar.config import ModelConfig
from megachiar.console import run
from megachiar.kernels.attention import attention_among, causal_attention, routed_attention
from megachiar.kernels.spectral import spectral_entropy, spectral_mix
from megachiar.model.grid import Grid
from megachiar.model.init import initialise
from megachiar.model.stages import build_layer
from megachiar.topology import ALONE

DENSE = "attention in every row"


def main() -> int:
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        launch.keep_freed_memory()
    print(f"d {options.hidden_size}, {options.heads} heads, {options.precision}; {machine(device)}")
    record: dict = {"machine": machine(device), "options": vars(options) | {"json": str(options.json)}, "lengths": {}}
    for length in options.sequence_length:
        sequences = max(1, options.tokens // length)
        print(f"\n{sequences} sequences of {length} tokens")
        layers = compare(layer_passes(options, sequences, length, device), DENSE, options.rounds, device)
        operators = compare(operator_passes(options, sequences, length, device), DENSE, options.rounds, device)
        record["lengths"][length] = {"sequences": sequences, "layers": layers, "operators": operators}
    write_json(options.json, record)
    return 0


Pass = Callable[[], torch.Tensor]
"""A forward pass; its result is differentiated."""


def layer_passes(options, sequences: int, length: int, device: torch.device) -> dict[str, Pass]:
    dtype = getattr(torch, options.precision)
    x = torch.randn(sequences * length, options.hidden_size, device=device).to(dtype).requires_grad_()
    grid = Grid(sequences, length)

    def layer(share: float | None, keys: str) -> Pass:
        config = model_config(options, length, share, keys, x)
        index = 1 if share is not None else 2
        module = build_layer(config, index, ALONE)
        initialise(module, config, 0, ALONE, prefix=f"layers.{index}")
        module = module.to(device=device, dtype=dtype).train()
        return lambda: module(x, grid, None, None).rows

    passes = {f"layer, {DENSE}": layer(None, "all")}
    for share in options.attention_share:
        for keys in ("all", "routed"):
            passes[f"layer, share {share:g}, keys of {keys}"] = layer(share, keys)
    return passes


def model_config(options, length: int, share: float | None, keys: str, x: torch.Tensor) -> ModelConfig:
    """Three layers, the middle one routed at a threshold that sends ``share`` of ``x`` to attention."""
    entropy = spectral_entropy(x.detach())
    tau = entropy.float().quantile(1 - share).clamp(0, 1).item() if share is not None else 0.5
    return ModelConfig.model_validate(
        {
            "num_layers": 3,
            "hidden_size": options.hidden_size,
            "num_attention_heads": options.heads,
            "vocab_size": 16,
            "max_sequence_length": length,
            "router": {"tau": tau},
            "attention": {"keys": keys},
        }
    )


def operator_passes(options, sequences: int, length: int, device: torch.device) -> dict[str, Pass]:
    """The products of attention by themselves, and DCT mixing of all rows."""
    dtype, heads, size = getattr(torch, options.precision), options.heads, options.hidden_size // options.heads
    shape = (sequences, heads, length, size)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    x = torch.randn(sequences * length, options.hidden_size, device=device).to(dtype).requires_grad_()
    weight = torch.ones(options.hidden_size, device=device, dtype=dtype, requires_grad=True)

    def norm(y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, y.shape[-1:])

    def packed(y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return y.transpose(1, 2).flatten(0, 1).index_select(0, rows)

    passes: dict[str, Pass] = {f"operator, {DENSE}": lambda: causal_attention(q, k, v)}
    for share in options.attention_share:
        rows = (torch.rand(sequences * length, device=device) < share).nonzero().flatten()
        passes[f"operator, share {share:g}, keys of all"] = lambda rows=rows: routed_attention(
            packed(q, rows), k, v, rows, length
        )
        passes[f"operator, share {share:g}, keys of routed"] = lambda rows=rows: attention_among(
            packed(q, rows), packed(k, rows), packed(v, rows), rows, sequences, length
        )
    passes["operator, DCT mixing and norm"] = lambda: norm(x + spectral_mix(x, weight))
    return passes


def compare(passes: dict[str, Pass], rival: str, rounds: int, device: torch.device) -> dict[str, dict]:
    """Print and return the times of all, and how much faster each is than the first, whose name ends in ``rival``."""
    contenders = {name: timed(lambda p=forward: backward(p()), device) for name, forward in passes.items()}
    times = in_turn(contenders, rounds)
    first = next(name for name in passes if name.endswith(rival))
    report = {}
    for name, forward in passes.items():
        speed_up, kept = times.speed_up(name, over=first), kept_bytes(forward)
        told = times.spread(name).told(" ms", 1e3, 1)
        print(f"{name:38} {told:28} {speed_up.told('x'):24} keeps {kept / 2**20:7.1f} MiB", flush=True)
        report[name] = {"seconds": times.seconds[name], "speed_up": speed_up, "kept_bytes": kept}
    return report


def backward(result: torch.Tensor) -> None:
    result.sum().backward()


def kept_bytes(forward: Pass) -> int:
    """Bytes that autograd keeps, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512, help="d (%(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--sequence-length", type=int, nargs="+", default=[256, 1024, 4096], help="T (256 1024 4096)")
    parser.add_argument("--tokens", type=int, default=4096, help="in all, at least one sequence (%(default)s)")
    parser.add_argument("--attention-share", type=float, nargs="+", default=[0.5, 0.25], help="(0.5 0.25)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="times each is measured (%(default)s)")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(main)
