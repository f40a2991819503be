"""Pretrain a CHIAR-Former (or its attention-only baseline) as one YAML file says.

    megachiar pretrain --config configs/tiny.yaml
    deepspeed megachiar/pretrain.py --config configs/400m.yaml
    torchrun --nproc_per_node 8 megachiar/pretrain.py --config configs/400m.yaml

Exit codes: 0 finished; 2 something to mend, said in one message; 75 a signal stopped the run after it saved, start it
again to go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megachiar import launch
from megachiar.console import global_rank, make_console, run
from megachiar.options import CommandParser, add_config_options


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("pretrain", __doc__)
    add_config_options(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, parameters, memory per rank and FLOPs a step, and exit",
    )
    parser.add_argument("--world-size", type=int, help="--dry-run: ranks to plan for (default: those started)")
    return parser.parse_args(launch.drop_launcher_arguments(argv))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    signals = launch.StopSignals()
    signals.install()
    launch.prepare_environment()

    from megachiar.config import load_config

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        from megachiar.training.dry_run import print_plan

        if global_rank() == 0:
            print_plan(config, options.world_size)
        return 0

    from megachiar.topology import build_topology

    topology = build_topology(config)
    launch.configure_torch(config.training.threads)

    from megachiar.training.run import pretrain

    return pretrain(config, topology, signals, make_console())


if __name__ == "__main__":
    run(main)
