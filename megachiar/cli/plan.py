"""List the layouts that fit a config into a cluster, best first.

    megachiar plan --gpus 64 --memory-gib 80 --config configs/7b.yaml
    megachiar plan --gpus 64 --memory-gib 80 --config configs/7b.yaml \
        --mtbf-hours 50000 --save-seconds 20 --start-seconds 300     # and how often to save where GPUs fail

Each layout is planned as ``--dry-run`` plans it. Memory follows from formulas, which tests compare with tensors that
are really allocated; FLOPs and traffic are counted. The time of a step is an estimate, from the data sheet of ``--gpu``
and what training reaches of it. docs/planning.md holds such estimates against published runs. ``--tflops``,
``--node-gb-s`` and ``--network-gb-s`` give speeds that you measured.

With ``--mtbf-hours`` it prints how often to save (Young's and Daly's formula), and how much time failures take. It does
so for these GPUs and for 64, 1,024 and 16,384. Measure saves and starts in one of your runs. The 16,384 GPUs of Llama 3
failed 419 times in 54 days (arXiv:2407.21783), which is 50,000 hours a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megachiar.errors import UserError
from megachiar.options import CommandParser, OptionError, add_config_options, number
from megachiar.planning.gpus import GPUS, Gpu

if TYPE_CHECKING:
    from rich.table import Table

    from megachiar.config import RunConfig
    from megachiar.planning.layout_search import LayoutCandidate

SIZES = (64, 1024, 16384)
"""Numbers of GPUs that failures are planned for, besides the given one."""
MOST = 1e12
"""Largest rate, size or time that an option takes; more would overflow in the sums."""
MOST_GPUS = 1_000_000
POSITIVE = number(float, above=0, most=MOST)
DEFAULT_GPU = "h100"
FAILURE_OPTIONS = ("mtbf_hours", "save_seconds", "start_seconds")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)

    from rich.console import Console

    from megachiar.config import load_config
    from megachiar.planning.layout_search import Machine, find_layouts

    config = load_config(options.config, options.overrides)
    machine = Machine(
        gpus=options.gpus,
        gpus_per_node=min(options.gpus, options.gpus_per_node),
        memory=options.memory_gib * 2**30 * (1 - options.reserve),
        gpu=gpu_of(options),
    )
    layouts, refused = find_layouts(config, machine)
    if not layouts:
        reasons = "; ".join(f"{count} {reason}" for reason, count in refused.most_common())
        reasons = reasons or "the batch and the layers cannot be shared out to so many"
        raise UserError(
            options.config,
            f"no layout fits {options.gpus} GPUs of {options.memory_gib:g} GiB ({reasons})",
            "give more GPUs or memory, or let --set parallel.offload_optimizer=true move the optimizer to the host",
        )
    Console(width=160).print(table_of(layouts[: options.top], config))
    left_out = "; ".join(f"{count} {reason}" for reason, count in refused.most_common())
    print(f"{len(layouts)} layouts fit{f'; left out: {left_out}' if left_out else ''}")
    print("the first as overrides: --set " + " ".join(layouts[0].overrides))
    if options.mtbf_hours is not None:
        print_goodput(options, layouts[0].seconds)
    return 0


def gpu_of(options: argparse.Namespace) -> Gpu:
    """Return the GPU that is planned for: that of ``--gpu``, with the speeds that were given.

    A given rate of products changes that of attention alike. It leaves MFU out where no GPU is named.
    """
    gpu = GPUS[options.gpu or DEFAULT_GPU]
    if options.tflops is not None:
        factor = options.tflops * 1e12 / gpu.products
        gpu = replace(
            gpu,
            peak=gpu.peak if options.gpu else None,
            products=gpu.products * factor,
            attention=gpu.attention * factor,
            tf32=gpu.tf32 * factor,
            fp32=gpu.fp32 * factor,
        )
    if options.node_gb_s is not None:
        gpu = replace(gpu, node_bandwidth=options.node_gb_s * 1e9)
    if options.network_gb_s is not None:
        gpu = replace(gpu, network_bandwidth=options.network_gb_s * 1e9)
    return gpu


def print_goodput(options: argparse.Namespace, step_seconds: float) -> None:
    """Print how often to save, and the cost of failures, for the given GPUs and for the sizes of ``SIZES``."""
    from rich.console import Console
    from rich.table import Table

    from megachiar.planning.goodput import HOUR, Failures, plan_goodput

    failures = Failures(
        gpu_mtbf=options.mtbf_hours * HOUR,
        save=options.save_seconds,
        start=options.start_seconds,
        write=options.write_seconds,
        straggler_loss=options.straggler_loss,
    )
    table = Table(title=f"a GPU fails every {options.mtbf_hours:,g} h, a save takes {options.save_seconds:g} s")
    for name in ("GPUs", "a failure every", "save every", "goodput", "lost a week"):
        table.add_column(name, justify="right")
    for gpus in sorted({options.gpus, *SIZES}):
        plan = plan_goodput(failures, gpus)
        table.add_row(
            f"{gpus:,}",
            f"{plan.mtbf / HOUR:,.1f} h",
            f"{plan.interval / 60:,.1f} min",
            f"{plan.goodput:.1%}",
            f"{plan.lost_hours_a_week:.1f} h",
        )
    Console(width=160).print(table)
    every = max(1, round(plan_goodput(failures, options.gpus).interval / step_seconds))
    print(f"on {options.gpus:,} GPUs with steps of {step_seconds:.3g} s: --set checkpoint.every={every}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("plan", __doc__)
    add_config_options(parser)
    parser.add_argument("--gpus", type=number(int, least=1, most=MOST_GPUS), required=True, help="GPUs in all")
    parser.add_argument("--memory-gib", type=POSITIVE, required=True, help="memory of one GPU")
    parser.add_argument(
        "--gpus-per-node", type=number(int, least=1), default=8, help="GPUs that share a node (%(default)s)"
    )
    parser.add_argument(
        "--reserve",
        type=number(float, least=0, below=1),
        default=0.1,
        help="share of memory kept free for libraries (%(default)s)",
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), help=f"kind of GPU, whose speeds are taken ({DEFAULT_GPU})")
    parser.add_argument("--tflops", type=POSITIVE, help="TFLOP/s a GPU reaches in large products (that of --gpu)")
    parser.add_argument("--node-gb-s", type=POSITIVE, help="GB/s a GPU sends within its node (that of --gpu)")
    parser.add_argument("--network-gb-s", type=POSITIVE, help="GB/s a GPU sends to other nodes (that of --gpu)")
    parser.add_argument("--top", type=number(int, least=1), default=12, help="number of layouts to list (%(default)s)")
    add_failure_options(parser)
    options = parser.parse_args(argv)
    given = {name: getattr(options, name) is not None for name in FAILURE_OPTIONS}
    if any(given.values()) and not all(given.values()):
        missing = " and ".join(f"--{name.replace('_', '-')}" for name, is_given in given.items() if not is_given)
        raise OptionError(missing, "is missing: failures, saves and starts are planned together", "give all three")
    return options


def add_failure_options(parser: CommandParser) -> None:
    """Add the options for failures and saves; the three of ``FAILURE_OPTIONS`` belong together."""
    parser.add_argument("--mtbf-hours", type=POSITIVE, help="mean hours between failures of one GPU")
    parser.add_argument("--save-seconds", type=POSITIVE, help="seconds that a save stops training")
    parser.add_argument("--start-seconds", type=POSITIVE, help="seconds from a failure to the first step")
    parser.add_argument(
        "--write-seconds",
        type=number(float, least=0, most=MOST),
        default=0.0,
        help="seconds until a checkpoint is complete, while training goes on",
    )
    parser.add_argument(
        "--straggler-loss",
        type=number(float, least=0, below=1),
        default=0.0,
        help="share of a step that ranks wait for slow ranks (%(default)s)",
    )


def table_of(layouts: list[LayoutCandidate], config: RunConfig) -> Table:
    """Return a table of layouts, in their order, with memory and time of a step of each."""
    from rich.markup import escape
    from rich.table import Table

    from megachiar.training.dry_run import gib

    table = Table(
        title=escape(f"{config.logging.folder}: {config.precision.compute}, batch {config.training.global_batch_size}")
    )
    for name in ("pp", "tp", "dp", "sequence", "ZeRO", "micro-batch", "recompute", "memory a GPU", "step", "MFU"):
        table.add_column(name, justify="right")
    table.add_column("where the time goes")
    for layout in layouts:
        p = layout.config.parallel
        table.add_row(
            str(p.pipeline_size),
            str(p.tensor_size),
            str(p.data_size),
            "yes" if p.sequence else "no",
            str(p.zero_stage),
            str(layout.config.training.micro_batch_size),
            "yes" if layout.config.training.activation_checkpoint_interval else "no",
            gib(layout.memory),
            f"{layout.seconds:.3g} s",
            "-" if layout.utilisation is None else f"{layout.utilisation:.0%}",
            layout.reason,
        )
    return table
