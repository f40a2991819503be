"""Repeat a step of a run on the CPU and name the first module whose output or gradient is not finite.

    megachiar replay runs/tiny --step 815
    megachiar replay runs/tiny --step 815 --json
    megachiar replay runs/tiny --step 815 --data.train.0.path=moved/train

The newest checkpoint before the step is loaded, and the steps up to it are repeated in one process, whatever the layout
of the run: the same samples, with the same dropout masks, under the config that the run had then. A step of which the
run has an incident folder is repeated with the config, data and checkpoint of that incident. The numbers are compared
with those that the run recorded. Nothing in the run folder changes.

--set overrides keys of that config. Of the data it says only where it is now: the run's record says what the step read.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar import launch
from megachiar.console import make_console
from megachiar.errors import UserError
from megachiar.options import CommandParser, add_json_option, add_set_option

if TYPE_CHECKING:
    from rich.console import Console

    from megachiar.training.replay import Replay


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("replay", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="step to repeat, counted from 1")
    add_set_option(parser, "override keys of the step's config, such as data.train.0.path where its data has moved")
    add_json_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Repeat the step; imports stand where they are needed, since no GPU may be visible when torch is imported."""
    options = parse_arguments(argv)
    if options.step < 1:
        raise UserError("--step", f"{options.step} is no step", "steps are counted from 1, as the log counts them")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    launch.prepare_environment()
    launch.configure_torch(None)

    from rich.markup import escape

    from megachiar.training.replay import replay

    console = make_console()
    found = replay(options.run, options.step, lambda line: console.print(escape(line)), options.overrides)
    if options.json:
        print(json.dumps(as_dict(found)))
    else:
        print_replay(found, console)


def as_dict(found: Replay) -> dict[str, object]:
    """Return the values of ``--json``; a number that is not finite is null."""
    from dataclasses import asdict

    from megachiar.training.json_lines import without_nan

    return without_nan(
        {
            "step": found.step,
            "checkpoint": found.checkpoint and str(found.checkpoint),
            "config": str(found.config),
            "incident": found.incident and str(found.incident),
            "loss": found.result.loss,
            "gradient_norm": found.result.gradient_norm,
            "learning_rate": found.learning_rate,
            "recorded": found.recorded and asdict(found.recorded),
            "differs": bool(found.difference),
            "first_bad": found.first_bad and asdict(found.first_bad),
            "samples": found.samples and list(found.samples),
            "task": found.task,
            "layers": [asdict(layer) for layer in found.layers],
        }
    )


def print_replay(found: Replay, console: Console) -> None:
    """Print the numbers of the step, the norms of its layers, and what is not finite."""
    from rich.table import Table

    table = Table(title=f"step {found.step}", title_justify="left")
    for name in ("layer", "norm of outputs", "norm of their gradients"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for layer in found.layers:
        table.add_row(layer.name, f"{layer.output:.4g}", f"{layer.gradient:.4g}")
    console.print(table)
    numbers = f"loss {found.result.loss:.4f}, gradient norm {found.result.gradient_norm:.4f}"
    console.print(f"{numbers}, learning rate {found.learning_rate:.3g}")
    _print_comparison(found, console)
    bad = found.first_bad
    if bad is None:
        console.print("every output and every gradient is finite")
        return
    from megachiar.config.tasks import MAIN_TASK

    assert found.samples is not None, "a bad module was found in a micro-batch"
    before = f"that of {bad.before} before it was finite" if bad.before else "nothing comes before it"
    of_task = "" if found.task in (None, MAIN_TASK) else f" of task {found.task}"
    console.print(
        f"[bold red]{bad.module}: {bad.what} is not finite[/], first in the {bad.direction} pass of the samples "
        f"{found.samples.start} to {found.samples.stop - 1}{of_task}; {before}"
    )


def _print_comparison(found: Replay, console: Console) -> None:
    """Print whether the repeated step has the numbers that the run recorded."""
    if found.recorded is None:
        console.print("the run has recorded no numbers of this step to compare these with")
    elif found.difference:
        console.print(f"[bold yellow]this is not what the run did:[/] {found.difference}")
    else:
        console.print("these are the numbers that the run recorded, but for rounding")
