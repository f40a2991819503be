"""Pretrain a CHIAR-Former (or its attention-only baseline) as one YAML file says.

    megachiar pretrain --config configs/tiny.yaml
    deepspeed megachiar/pretrain.py --config configs/400m.yaml
    torchrun --nproc_per_node 8 megachiar/pretrain.py --config configs/400m.yaml

Exit codes: 0, the run is finished; 2, one message says what to correct; 75, a signal or training.stop_after stopped the
run after it saved a checkpoint, and the same command continues it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megachiar import launch
from megachiar.console import global_rank, make_console, print_warning, run
from megachiar.launcher_watch import LauncherWatch
from megachiar.log_streams import lose_what_cannot_be_written
from megachiar.options import CommandParser, add_config_options, number
from megachiar.stop_signals import StopSignals

if TYPE_CHECKING:
    from megachiar.config import RunConfig
    from megachiar.training.run import ShowRun


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what launchers append to it is dropped."""
    parser = CommandParser("pretrain", __doc__)
    add_config_options(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, parameters, memory per rank and FLOPs per step, and exit",
    )
    parser.add_argument(
        "--world-size", type=number(int, least=1), help="--dry-run: ranks to plan for (default: the started ones)"
    )
    return parser.parse_args(launch.drop_launcher_arguments(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or print the plan with ``--dry-run``; every rank calls this function.

    Imports stand where they are needed: the environment must be prepared before torch is imported.

    Returns:
        The exit code of the process.

    Raises:
        UserError: config, data, checkpoint, layout or disk do not allow the run.
    """
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    lose_what_cannot_be_written()
    signals = StopSignals()
    signals.install()
    LauncherWatch().start()
    launch.prepare_environment()

    from megachiar.config import load_config

    launch.refuse_shared_pipe(options.config)
    config = load_config(options.config, options.overrides)
    if options.dry_run:
        from megachiar.training.dry_run import print_plan

        if global_rank() == 0:
            print_plan(config, options.world_size)
        return 0

    from megachiar.topology import build_topology

    topology = build_topology(config)
    signals.stop_after(config.training.stop_after)
    launch.configure_torch(config.training.threads)

    from megachiar.evaluation.in_training import check_asked, make_asked
    from megachiar.interop.finished_run import check_export, export_finished
    from megachiar.training.run import pretrain

    check_export(config)
    check_asked(config)
    console = make_console()
    with show_on_page(config, topology.is_main) as show:
        code = pretrain(config, topology, signals, console, show, make_asked)
    if code == 0 and topology.is_main:
        export_finished(config, console.print)
    return code


@contextlib.contextmanager
def show_on_page(config: RunConfig, is_main: bool) -> Iterator[ShowRun | None]:
    """Yield what shows the run on its page; None where this rank or ``logging.page`` writes none.

    At the end of the block the page is written once more, however the run ended.
    """
    if not (is_main and config.logging.page):
        yield None
        return
    from megachiar.monitoring.run_page import RunPage

    page = RunPage(config, print_warning)
    try:
        yield page.update
    finally:
        page.close()


if __name__ == "__main__":
    run(main)
