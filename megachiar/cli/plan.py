"""List the layouts in which a config fits a cluster, best first.

    megachiar plan --gpus 64 --memory-gib 80 --config configs/7b.yaml

Each layout is planned as ``--dry-run`` plans it. Memory follows from formulas, which tests compare with tensors that
are really allocated; FLOPs and traffic are counted. The time of a step is an estimate, by which layouts are ranked. It
follows from the speeds given: arithmetic, the pipeline's bubble, the traffic of the tensor-parallel group (which
nothing hides), and that of the replicas (at the end of a step).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megachiar.errors import UserError
from megachiar.options import CommandParser, add_config_options

if TYPE_CHECKING:
    from rich.table import Table

    from megachiar.config import RunConfig
    from megachiar.planning.layout_search import LayoutCandidate


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
        flops=options.tflops * 1e12,
        node_bandwidth=options.node_gb_s * 1e9,
        network_bandwidth=options.network_gb_s * 1e9,
    )
    layouts, refused = find_layouts(config, machine)
    if not layouts:
        reasons = "; ".join(f"{count} {reason}" for reason, count in refused.most_common())
        raise UserError(
            options.config,
            f"no layout fits {options.gpus} GPUs of {options.memory_gib:g} GiB ({reasons})",
            "give more GPUs or memory, or let --set parallel.offload_optimizer=true move the optimizer to the host",
        )
    Console(width=160).print(table_of(layouts[: options.top], config))
    left_out = "; ".join(f"{count} {reason}" for reason, count in refused.most_common())
    print(f"{len(layouts)} layouts fit{f'; left out: {left_out}' if left_out else ''}")
    print("the first as overrides: --set " + " ".join(layouts[0].overrides))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("plan", __doc__)
    add_config_options(parser)
    parser.add_argument("--gpus", type=_positive(int), required=True, help="GPUs in all")
    parser.add_argument("--memory-gib", type=_positive(float), required=True, help="memory of one GPU")
    parser.add_argument("--gpus-per-node", type=_positive(int), default=8, help="GPUs that share a node (%(default)s)")
    parser.add_argument("--reserve", type=float, default=0.1, help="share of memory left to libraries (%(default)s)")
    parser.add_argument("--tflops", type=_positive(float), default=400, help="TFLOP/s a GPU reaches (%(default)s)")
    parser.add_argument(
        "--node-gb-s", type=_positive(float), default=350, help="GB/s a GPU sends in a node (%(default)s)"
    )
    parser.add_argument("--network-gb-s", type=_positive(float), default=40, help="GB/s it sends beyond (%(default)s)")
    parser.add_argument("--top", type=_positive(int), default=12, help="layouts that are listed (%(default)s)")
    options = parser.parse_args(argv)
    if not 0 <= options.reserve < 1:
        parser.error(f"argument --reserve: {options.reserve} is no share in [0, 1)")
    return options


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return a function by which argparse reads a number above 0."""

    def parsed(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parsed.__name__ = kind.__name__
    return parsed


def table_of(layouts: list[LayoutCandidate], config: RunConfig) -> Table:
    """Return a table of layouts, in their order, with memory and time of a step of each."""
    from rich.table import Table

    from megachiar.training.dry_run import gib

    table = Table(
        title=f"{config.logging.folder}: {config.precision.compute}, batch {config.training.global_batch_size}"
    )
    for name in ("pp", "tp", "dp", "sequence", "ZeRO", "micro-batch", "recompute", "memory a GPU", "step"):
        table.add_column(name, justify="right")
    table.add_column("why here")
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
            layout.reason,
        )
    return table
