"""Time operators and whole layers in turn, as ``megachiar bench-layers`` says."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

from megachiar import launch
from megachiar.analysis.device_activity import measure_activity
from megachiar.analysis.peer_operators import FLASH_ATTENTION, LIGER_LOSS, flash_attention, liger_loss
from megachiar.benchmark import copy, machine, matrix_product, measure_interleaved, timed, write_json
from megachiar.config import ModelConfig
from megachiar.kernels.attention import causal_attention, routed_attention, routed_self_attention
from megachiar.kernels.cross_entropy import linear_cross_entropy
from megachiar.kernels.norm import add_and_norm
from megachiar.kernels.routed_rows import RoutedRows
from megachiar.kernels.spectral import mix_add_and_norm, spectral_entropy, spectrum_and_entropy
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.init import initialise
from megachiar.model.layer_stack import build_layer
from megachiar.model.static_shapes import use_static_shapes, why_kernels_do_not
from megachiar.planning.flops import transform_flops
from megachiar.topology import SINGLE_RANK

DENSE = "attention in every row"
VOCABULARY = 32768


class Pass(NamedTuple):
    """A forward pass, whose result is differentiated.

    Attributes:
        forward: returns the result, or None where there is nothing to differentiate.
        flops: of forward and backward pass, as the module counts them.
        bytes: likewise; 0 where they are not counted.
    """

    forward: Callable[[], torch.Tensor | None]
    flops: float
    bytes: float = 0

    def run(self) -> None:
        """Run the forward and the backward pass."""
        result = self.forward()
        if result is not None:
            result.sum().backward()


class Limits(NamedTuple):
    """The most FLOPs and bytes a second that were measured on the machine."""

    flops: float
    bytes: float

    def seconds(self, work: Pass) -> float:
        """Return the least seconds that ``work`` needs."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def time_layers(options: argparse.Namespace) -> None:
    """Run the measurements of the command line, print them, and write them to ``--json``."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        launch.keep_freed_memory()
    limits = measure_limits(getattr(torch, options.precision), device)
    print(f"d {options.hidden_size}, {options.heads} heads, {options.precision}; {machine(device)}")
    print(f"matrix product {limits.flops / 1e9:,.0f} GFLOP/s, copy {limits.bytes / 1e9:,.0f} GB/s")
    record: dict = {"machine": machine(device), "options": vars(options) | {"json": str(options.json)}, "lengths": {}}
    record["limits"] = limits._asdict()
    for length in options.sequence_length:
        sequences = max(1, options.tokens // length)
        print(f"\n{sequences} sequences of {length} tokens")
        layers = compare(layer_passes(options, sequences, length, device), limits, options.rounds, device)
        operators = compare(operator_passes(options, sequences, length, device), limits, options.rounds, device)
        record["lengths"][length] = {"sequences": sequences, "layers": layers, "operators": operators}
        write_json(options.json, record)  # after each length: what ends the program may leave no time for all


def measure_limits(dtype: torch.dtype, device: torch.device) -> Limits:
    """Measure the limits of this machine, as medians of 9."""
    with torch.no_grad():
        (product, flops), (copied, size) = matrix_product(dtype, device), copy(device)
        times = measure_interleaved({"product": timed(product, device), "copy": timed(copied, device)}, 9)
    return Limits(flops / times.spread("product").median, size / times.spread("copy").median)


def layer_passes(options: argparse.Namespace, sequences: int, length: int, device: torch.device) -> dict[str, Pass]:
    """Return the passes of a dense layer, and of a routed one for each share of attention and kind of keys."""
    dtype, d = getattr(torch, options.precision), options.hidden_size
    x = torch.randn(sequences * length, d, device=device).to(dtype).requires_grad_()
    layout = BatchLayout(sequences, length)

    def layer(share: float | None, keys: str) -> Pass:
        config = model_config(options, length, share, keys, x)
        index = 1 if share is not None else 2
        module = build_layer(config, index, SINGLE_RANK)
        initialise(module, config, 0, SINGLE_RANK, prefix=f"layers.{index}")
        module = module.to(device=device, dtype=dtype).train()
        if why_kernels_do_not(config, length, False, device, dtype) is None:
            use_static_shapes(module)
        f = 1.0 if share is None else share
        projections = 4 * f + (4 * f if keys == "routed" else 4)  # query and output, key and value
        flops = 3 * len(x) * d * d * (projections + 16)
        pairs = len(x) * (length + 1) / 2 * f * (f if keys == "routed" else 1)
        return Pass(lambda: module(x, layout, None, None).hidden_states, flops + 12 * d * pairs)

    passes = {f"layer, {DENSE}": layer(None, "all")}
    for share in options.attention_share:
        for keys in ("all", "routed"):
            passes[f"layer, share {share:g}, keys of {keys}"] = layer(share, keys)
    return passes


def model_config(
    options: argparse.Namespace, length: int, share: float | None, keys: str, x: torch.Tensor
) -> ModelConfig:
    """Return a config of three layers; the threshold of the middle one sends ``share`` of ``x`` to attention."""
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


def operator_passes(options: argparse.Namespace, sequences: int, length: int, device: torch.device) -> dict[str, Pass]:
    """Return the passes of attention alone, and of the operators that work row by row on all rows."""
    dtype, heads, d = getattr(torch, options.precision), options.heads, options.hidden_size
    shape = (sequences, length, heads, d // heads)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    tokens, row = sequences * length, d * q.element_size()

    def attention(forward: Callable[[], torch.Tensor], queries: int, keys: int, pairs: float) -> Pass:
        return Pass(forward, 12 * d * pairs, 6 * row * (queries + keys))

    def routed_attentions(share: float, rows: RoutedRows) -> dict[str, Pass]:
        indices = rows.indices
        routed_q, routed_k, routed_v = (
            y.detach().flatten(0, 1).index_select(0, indices).requires_grad_() for y in (q, k, v)
        )
        n, positions = len(indices), (indices % length + 1).sum().item()
        pairs = sum(count * (count + 1) / 2 for count in (indices // length).bincount().tolist())
        return {
            f"operator, share {share:g}, keys of all": attention(
                lambda: routed_attention(routed_q, keys, values, rows), n, tokens, positions
            ),
            f"operator, share {share:g}, keys of routed": attention(
                lambda: routed_self_attention(routed_q, routed_k, routed_v, rows), n, n, pairs
            ),
        }

    queries, keys, values = (y.transpose(1, 2) for y in (q, k, v))  # (B, h, T, c)
    pairs = tokens * (length + 1) / 2
    passes = {f"operator, {DENSE}": attention(lambda: causal_attention(queries, keys, values), tokens, tokens, pairs)}
    if device.type == "cuda" and q.element_size() == 2 and (flash := flash_attention()) is not None:
        passes[FLASH_ATTENTION] = attention(lambda: flash(q, k, v), tokens, tokens, pairs)
    for share in options.attention_share:
        indices = (torch.rand(tokens, device=device) < share).nonzero().flatten()
        passes |= routed_attentions(share, RoutedRows(indices, sequences, length))
    x, branch_output = (torch.randn(tokens, d, device=device).to(dtype).requires_grad_() for _ in range(2))
    filters, weight, bias = (torch.ones(d, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    head = torch.randn(VOCABULARY, d, device=device).mul_(0.02).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,), device=device)
    transform = transform_flops(d)
    passes["operator, spectral entropy"] = Pass(
        lambda: spectrum_and_entropy(x.detach()) and None, tokens * transform, tokens * row
    )
    passes["operator, DCT mixing and norm"] = Pass(
        lambda: mix_add_and_norm(x, filters, 1.0, None, weight, bias, 1e-5), 4 * tokens * transform, 5 * tokens * row
    )
    passes["operator, residual and norm"] = Pass(
        lambda: add_and_norm(x, branch_output, weight, bias, 1e-5), 0, (4 + 3) * tokens * row
    )
    passes[f"operator, loss, {VOCABULARY} tokens"] = Pass(
        lambda: linear_cross_entropy(x, head, targets).loss, 6 * tokens * d * VOCABULARY
    )
    if device.type == "cuda" and (liger := liger_loss()) is not None:
        passes[LIGER_LOSS] = Pass(lambda: liger(x, head, targets), 6 * tokens * d * VOCABULARY)
    return passes


def compare(passes: dict[str, Pass], limits: Limits, rounds: int, device: torch.device) -> dict[str, dict]:
    """Print and return the times of all passes, and how many times as fast each is as the first."""
    calls = 8 if device.type == "cuda" else 1  # so that the host runs ahead of the GPU, as it does in training
    times = measure_interleaved({name: timed(work.run, device, calls) for name, work in passes.items()}, rounds)
    first, report = next(iter(passes)), {}
    for name, work in passes.items():
        speed_up, kept, spread = times.speed_up(name, over=first), kept_bytes(work), times.spread(name)
        activity = measure_activity(work.run, device)
        busy = activity.busy_seconds
        took = spread.median if busy is None else busy
        of_limit, rate = limits.seconds(work) / took, work.flops / took
        busy_text = f"  busy {busy * 1e3:6.2f} ms, {activity.launches:4.0f} launches" if busy is not None else ""
        print(
            f"{name:38} {spread.format(' ms', 1e3, 2):30} {speed_up.format('x'):22}{busy_text}  "
            f"keeps {kept / 2**20:7.1f} MiB  {rate / 1e9:9,.0f} GFLOP/s  {of_limit:4.0%} of the limit",
            flush=True,
        )
        report[name] = {
            "seconds": times.seconds[name],
            "speed_up": speed_up,
            "kept_bytes": kept,
            "flops": work.flops,
            "bytes": work.bytes,
            "activity": activity._asdict(),
            "of_limit": of_limit,
        }
    return report


def kept_bytes(work: Pass) -> int:
    """Return the bytes that autograd keeps of the forward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work.forward()
    return sum(kept.values())
