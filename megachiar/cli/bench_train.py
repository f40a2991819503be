"""Time training steps in turn: CHIAR-Former, its attention-only baseline, and any other program.

    megachiar bench-train --hidden-size 256 --layers 4 --heads 4 --sequence-length 256 --batch 8
    megachiar bench-train --precision fp32 bf16 --peer published='python /path/to/adapter.py'

    megachiar bench-train --variant compiled training.compile=inductor

    megachiar bench-train --variant published model.router.kind=hard model.router.tau=null \\
      --variant dct_only model.router.kind=hard model.router.tau=null model.router.hard_gradient=dct_only

A step is that of a run: forward, backward, AdamW. Each contender is a process of its own. They take turns, round by
round, and wait for their turn without computing. Every router, of whatever kind, sends ``--attention-share`` of its
tokens to attention in the first step: by thresholds, or by numbers that are added to the gates of a hard router. With
three operators the others share the rest. The share of the measured steps in routed layers is printed. Two more numbers
are printed: the peak memory of the process and, on a CPU, the peak of the tensors that a step makes. The former depends
on holes in the heap.

A second line says what a step does on a GPU: MFU against the dense peak of bf16 products; kernel launches; the time
that the host needs; the time that the GPU is busy, and the share of the step in which it waits. All but MFU come from
the profiler, in steps outside the timed rounds. On a CPU the line has the number of aten operations.

``--bound`` adds a contender that only repeats the matrix products and attention calls of a CHIAR-Former step, on the
tensors that they had in it. This is the time of a step if everything else cost nothing. It works on CPUs.

A variant is CHIAR-Former with keys of the config set, as by ``--set`` of ``megachiar pretrain``. Each contender is
compared with the baseline, with the variants and with the peers.

A peer is a command that is started once. It reads the size of the model from the environment (BENCH_HIDDEN_SIZE,
BENCH_LAYERS, BENCH_HEADS, BENCH_SEQUENCE_LENGTH, BENCH_BATCH, BENCH_VOCAB_SIZE, BENCH_THREADS) and builds the model.
For each line of its standard input it trains as many steps as the line says, and prints their seconds as a line of its
own. Other lines of its output are ignored. The peer ends when its input ends.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar import launch
from megachiar.console import silence
from megachiar.errors import UserError
from megachiar.options import CommandParser, number

if TYPE_CHECKING:  # a contender that is a process of its own imports them, this one does not
    import torch

    from megachiar.config import RunConfig
    from megachiar.engine.engine import Engine

CHIAR, BASELINE, BOUND = "chiar", "baseline", "products"
PLACES: dict[tuple[str, ...], str] = {
    ("model", "num_layers"): "--layers",
    ("model", "hidden_size"): "--hidden-size",
    ("model", "num_attention_heads"): "--heads",
    ("model", "vocab_size"): "--vocab-size",
    ("model", "max_sequence_length"): "--sequence-length",
    ("model", "dropout"): "--dropout",
}
"""Key of a config -> the option that sets it, for messages."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.serve:
        serve(options)
        return 0
    variants = [name for name, *_ in options.variant]
    for precision in options.precision:
        for kind in (CHIAR, *variants):
            config_of(options, kind, precision)  # refuses sizes that make no model, once

    import torch

    from megachiar.benchmark import machine, matrix_product, measure_interleaved, timed, write_json
    from megachiar.planning.peaks import peak_flops, why_no_utilisation

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.bound and device.type != "cpu":
        raise UserError("--bound", f"cannot replay a step on {device}", "leave it out, or set CUDA_VISIBLE_DEVICES=''")
    torch.set_num_threads(options.threads)
    launch.keep_freed_memory()
    peers = {name: Contender.peer(options, name, command) for name, command in options.peer}
    contenders = {
        f"{kind} {precision}": Contender.ours(argv, kind, precision)
        for kind in (CHIAR, *variants, BASELINE, *([BOUND] if options.bound else []))
        for precision in options.precision
    } | peers
    for contender in contenders.values():  # they compile side by side
        contender.ask(options.warm_up)
    for contender in contenders.values():
        contender.answer()
    products: dict[str, tuple[Callable[[], float], int]] = {}
    for precision in options.precision:
        multiply, flops = matrix_product(torch.float32 if precision == "fp32" else torch.bfloat16, device)
        products[f"matrix product {precision}"] = (timed(multiply, device), flops)
    measured = {name: partial(contender.train, options.steps) for name, contender in contenders.items()}
    times = measure_interleaved(measured | {name: measure for name, (measure, _) in products.items()}, options.rounds)
    reports = {name: contender.finish() for name, contender in contenders.items()}

    tokens = options.batch * options.sequence_length
    shape = f"d {options.hidden_size}, {options.layers} layers, T {options.sequence_length}, batch {options.batch}"
    print(f"{shape}, vocabulary {options.vocab_size}; {machine(device)}")
    print("milliseconds a step: median (quartiles); speed-up over another contender in the same round")
    peak = peak_flops(device)
    if peak is None:
        print(why_no_utilisation(device) or "no MFU: a CPU has no peak in megachiar/planning/peaks.py")
    print()
    record: dict = {"machine": machine(device), "options": vars(options) | {"json": str(options.json)}}
    record |= {"peak_flops": peak, "contenders": {}}
    for name, report in reports.items():
        spread = times.spread(name)
        line = f"{name:16} {spread.format(' ms', 1e3, 1):28} {tokens / spread.median:9,.0f} tokens/s"
        entry = {"seconds": times.seconds[name], **report}
        if "flops" in report and name not in peers:  # a peer may be another version of this program
            precision = name.split()[-1]
            product = f"matrix product {precision}"
            rate = products[product][1] / times.spread(product).median
            reached = report["flops"] / spread.median
            line += f"  {reached / 1e9:7.0f} GFLOP/s, {reached / rate:.0%} of the matrix product's"
            if report["routed_attention_share"] is not None:
                line += f"  attention {report['routed_attention_share']:.2f} in routed layers"
            if "peak_bytes" in report:
                line += f"  memory {report['peak_bytes'] / 2**20:.0f} MiB"
            if "step_bytes" in report:
                line += f", tensors of a step {report['step_bytes'] / 2**20:.0f} MiB"
            entry["of_matrix_product"] = reached / rate
            entry |= utilisation(report, spread.median, peak)
        others = [*(f"baseline {p}" for p in options.precision), *peers]
        others += [f"{variant} {name.split()[-1]}" for variant in variants if name not in peers]
        ratios = {other: times.speed_up(name, other) for other in others if other != name}
        print(line)
        if text := describe_utilisation(entry):
            print(f"{'':16} {text}")
        for other, ratio in ratios.items():
            print(f"{'':16} {ratio.format('x')} of {other}")
        record["contenders"][name] = entry | {"speed_up": ratios}
    write_json(options.json, record)
    return 0


def utilisation(report: dict, seconds: float, peak: float | None) -> dict[str, float]:
    """Return which part of the peak a step reaches, and which part of its time the GPU waits, as far as they are known.

    Args:
        report: of the contender.
        seconds: of a step.
        peak: FLOP/s of the GPU; None where it is unknown.
    """
    found = {} if peak is None else {"model_flops_utilisation": report["flops"] / seconds / peak}
    busy = report.get("activity", {}).get("busy_seconds")
    return found if busy is None else found | {"gpu_waits": max(0.0, 1 - busy / seconds)}


def describe_utilisation(entry: dict) -> str:
    """Return the second line of a contender, of what is known; empty where nothing is."""
    activity = entry.get("activity", {})
    parts = [f"MFU {entry['model_flops_utilisation']:.1%}"] if "model_flops_utilisation" in entry else []
    if activity.get("operations") is not None:
        parts.append(f"{activity['operations']:,.0f} aten operations")
    if "gpu_waits" in entry:
        parts.append(f"{activity['launches']:,.0f} launches of {activity['kernels']:,.0f} kernels")
        parts.append(f"host {activity['host_seconds'] * 1e3:.1f} ms and {activity['waits']:.0f} waits")
        parts.append(f"GPU busy {activity['busy_seconds'] * 1e3:.1f} ms, waits {entry['gpu_waits']:.0%}")
    return "; ".join(parts)


class Contender:
    """A process that trains as many steps as it is asked for.

    Args:
        name: of the contender in messages.
        command: that starts it.
        environment: variables that it gets beside those of this process.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name = name
        self.process = subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout

    @classmethod
    def ours(cls, argv: Sequence[str], kind: str, precision: str) -> Contender:
        """Start this program as a contender that trains a model of ``kind`` in ``precision``."""
        command = [sys.executable, "-m", "megachiar", "bench-train"]
        return cls(kind, [*command, *argv, "--serve", kind, precision], {})

    @classmethod
    def peer(cls, options: argparse.Namespace, name: str, command: str) -> Contender:
        """Start another program as a contender; variables ``BENCH_...`` tell it the sizes of the model."""
        sizes = ("hidden_size", "layers", "heads", "sequence_length", "batch", "vocab_size", "threads")
        try:
            return cls(name, shlex.split(command), {f"BENCH_{s.upper()}": str(getattr(options, s)) for s in sizes})
        except (OSError, ValueError) as error:  # no such program, or quotes that do not end
            raise UserError(f"--peer {name}", f"cannot start {command!r}: {error}", "check the command") from None

    def train(self, steps: int) -> float:
        """Train ``steps`` steps and return the seconds of one."""
        self.ask(steps)
        return self.answer() / steps

    def ask(self, steps: int) -> None:
        """Let the process train ``steps`` steps, without waiting for them."""
        with contextlib.suppress(BrokenPipeError):  # a process that has ended gives no answer
            self.requests.write(f"{steps}\n")
            self.requests.flush()

    def answer(self) -> float:
        """Wait for the steps that were asked for, and return their seconds.

        Raises:
            UserError: the process has ended.
        """
        for line in self.replies:
            try:
                return float(line)
            except ValueError:
                continue
        raise UserError(
            self.name,
            f"ended with exit code {self.process.wait()} instead of training",
            "its own messages are above; run its command alone",
        )

    def finish(self) -> dict:
        """End the process and return its final report."""
        self.requests.close()
        last = self.replies.read().strip().splitlines()
        self.process.wait()
        return json.loads(last[-1]) if last and last[-1].startswith("{") else {}


def serve(options: argparse.Namespace) -> None:
    """Be one of our contenders: build and calibrate, then train as many steps as each line of standard input says."""
    kind, precision = options.serve
    launch.prepare_environment()
    launch.configure_torch(options.threads)
    import numpy as np
    import torch

    from megachiar.analysis.device_activity import measure_activity
    from megachiar.benchmark import synchronise
    from megachiar.engine.engine import Engine, start_process_group
    from megachiar.planning.flops import training_flops_per_token
    from megachiar.topology import build_topology

    config = config_of(options, kind, precision)
    before = peak_bytes()
    with silence():
        topology = build_topology(config)
        device = start_process_group(config, topology)
        engine = Engine(config, topology.with_groups(), device)
    tokens = np.random.default_rng(0).integers(0, options.vocab_size, (options.batch, options.sequence_length + 1))
    if kind != BASELINE:
        calibrate(engine, torch.from_numpy(tokens[:, :-1]).to(device), options.attention_share)
    shares: list[list[list[float]]] = []

    def step() -> None:
        result = engine.train_step([(0, tokens)], 1e-4)
        shares.append([result.attention_share, result.rbf_share])

    timed_step: Callable[[], None] = step
    if kind == BOUND:
        step()
        timed_step = products_of(step)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            timed_step()
        synchronise(device)  # what the optimizer has still to do is of this step, and not of the next contender's
        print(time.perf_counter() - start, flush=True)
    attention, rbf = np.mean(shares, 0)  # (layers,) each
    flops = training_flops_per_token(config.model, options.sequence_length, attention.mean(), rbf.mean())
    routed = [float(attention[index]) for index in config.model.routed_layers]
    report: dict = {
        "flops": float(flops * tokens[:, 1:].size),
        "attention_share": float(attention.mean()),
        "rbf_share": float(rbf.mean()),
        "routed_attention_share": sum(routed) / len(routed) if routed else None,
    }
    if kind != BOUND:
        report["peak_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes() - before
        if device.type == "cpu":
            report["step_bytes"] = allocated_peak(step)
        report["activity"] = measure_activity(step, device)._asdict()
    print(json.dumps(report), flush=True)
    torch.distributed.destroy_process_group()


def config_of(options: argparse.Namespace, kind: str, precision: str) -> RunConfig:
    """Return the config of a run with one batch a step; its dataset is never opened.

    Raises:
        ConfigError: the sizes make no model.
    """
    from megachiar.config.load import parse_with_overrides

    fields = {
        "model": {
            "kind": BASELINE if kind == BASELINE else CHIAR,
            "num_layers": options.layers,
            "hidden_size": options.hidden_size,
            "num_attention_heads": options.heads,
            "vocab_size": options.vocab_size,
            "max_sequence_length": options.sequence_length,
            "dropout": options.dropout,
            "router": {"tau": 0.5},
        },
        "data": {"train": [{"path": "none"}]},
        "parallel": {"zero_stage": 0 if precision == "fp32" else 1},
        "precision": {"compute": precision},
        "optimizer": {"learning_rate": 1e-4},
        "training": {
            "steps": 1_000_000,
            "evaluate_every": None,
            "global_batch_size": options.batch,
            "micro_batch_size": options.batch,
        },
        "logging": {"folder": "none"},
    }
    overrides = {name: keys for name, *keys in options.variant}.get(kind, [])
    return parse_with_overrides(fields, overrides, "megachiar bench-train", PLACES)


def calibrate(engine: Engine, tokens: torch.Tensor, share: float) -> None:
    """Let the routers send ``share`` of each routed layer's tokens of this batch to attention, layer by layer.

    DCT and RBF mixing share the other tokens equally. A soft router has no share: every token takes all operators.
    """
    import torch

    from megachiar.model.router import Router

    def set_share(router: Router, arguments: tuple) -> None:
        decision, others = router.forward(*arguments), len(router.operators) - 1
        if decision.score is not None:
            below = [(1 - share) * (index + 1) / others for index in range(others)]
            router.set_thresholds(tuple(decision.score.float().quantile(part).item() for part in below))
        elif router.kind == "hard":
            assert decision.gates is not None, "a hard router has gates"
            added = logits_for([(1 - share) / others] * others + [share], decision.gates.float().log())
            router.gate.register_forward_hook(lambda _, __, logits: logits + added.to(logits.dtype))

    routers = [module for module in engine.deepspeed.module.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_pre_hook(set_share) for router in routers]
    with torch.no_grad():
        engine.deepspeed(tokens)
    for hook in hooks:
        hook.remove()


def logits_for(shares: Sequence[float], logits: torch.Tensor) -> torch.Tensor:
    """Return numbers (O,) which, added to ``logits`` (n, O), make each column the largest one in its share of the rows.

    Each column is moved in turn until it has its share; with two columns the first turn is exact.
    """
    added = logits.new_zeros(logits.shape[1])
    for _ in range(20):
        for column, share in enumerate(shares[1:], 1):
            moved = logits + added
            others = moved.clone()
            others[:, column] = -math.inf
            lead = moved[:, column] - others.amax(1)
            added[column] -= lead.quantile(1 - share)
    return added


def products_of(step: Callable[[], object]) -> Callable[[], None]:
    """Return a function that repeats the matrix products and attention calls of ``step``, and nothing else.

    It works on a CPU alone. Elsewhere the backward pass runs in a thread of its own, and our kernels are no operators
    of torch.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Callable[..., object], tuple, dict]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            kwargs = kwargs or {}
            if name in ("mm", "addmm", "bmm", "baddbmm") or "attention" in name:
                calls.append((function, args, kwargs))
            return function(*args, **kwargs)

    with Record():
        step()

    @torch.no_grad()
    def repeat() -> None:
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return repeat


def allocated_peak(step: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by ``step`` take at once, without the holes of the heap."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = (e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(changes), default=0)


def peak_bytes() -> int:
    """Return the most bytes that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("bench-train", __doc__)
    parser.add_argument("--hidden-size", type=number(int, least=2), default=256, help="d (%(default)s)")
    parser.add_argument("--layers", type=number(int, least=2), default=4, help="(%(default)s)")
    parser.add_argument("--heads", type=number(int, least=1), default=4, help="(%(default)s)")
    parser.add_argument("--sequence-length", type=number(int, least=1), default=256, help="T (%(default)s)")
    parser.add_argument("--batch", type=number(int, least=1), default=8, help="sequences a step (%(default)s)")
    parser.add_argument("--vocab-size", type=number(int, least=1), default=8192, help="(%(default)s)")
    parser.add_argument("--dropout", type=number(float, least=0, below=1), default=0.0, help="(%(default)s)")
    parser.add_argument(
        "--attention-share", type=number(float, least=0, most=1), default=0.5, help="of routed layers (%(default)s)"
    )
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"], help="(fp32)")
    parser.add_argument("--peer", type=named, action="append", default=[], metavar="NAME=COMMAND", help="see above")
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"), help="see above"
    )
    parser.add_argument("--bound", action="store_true", help="time the products of a step alone as well")
    parser.add_argument(
        "--threads", type=number(int, least=1), default=len(os.sched_getaffinity(0)), help="CPU threads (%(default)s)"
    )
    parser.add_argument("--rounds", type=number(int, least=1), default=15, help="times each is measured (%(default)s)")
    parser.add_argument("--steps", type=number(int, least=1), default=2, help="steps a round (%(default)s)")
    # Layers are captured as CUDA graphs in the fourth step.
    parser.add_argument("--warm-up", type=number(int, least=0), default=5, help="steps before them (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    taken = [CHIAR, BASELINE, BOUND]
    for name, *_ in options.variant:
        if name in taken or any(c.isspace() for c in name):
            parser.error(f"--variant {name!r}: take a name of one word that no other contender has")
        taken.append(name)
    return options


def named(text: str) -> tuple[str, str]:
    """Split ``NAME=COMMAND`` of the command line."""
    name, equals, command = text.partition("=")
    if not (name and equals and command):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND")
    return name, command
