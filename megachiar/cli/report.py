"""Make tables and figures of runs, finished or running: CSV, LaTeX, PNG, PDF, and one HTML page.

    megachiar report runs/tiny --output report
    megachiar report runs/400m runs/400m_baseline --output report --prompt "The old man" "In 1998"
    megachiar report --sweep ablation --output report
    megachiar report --sweep ablation --from findings --output report       # of collected results

Of each RUN: main results, every set, WikiText-2, classification, continuations of prompts; curves of losses, gate and
attention shares, and the routes of a text. Runs FOLDER/VARIANT/seed_N are compared by seed. What a run does not have is
left out and said. Figures need the package matplotlib: pip install -c constraints.txt -e '.[report]'
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar.console import make_console
from megachiar.errors import UserError
from megachiar.options import CommandParser, OptionError, number

if TYPE_CHECKING:
    from megachiar.config.sweep import Sweep
    from megachiar.reporting.model_looks import LookSettings
    from megachiar.reporting.reported_run import ReportedRun


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("report", __doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="run folder (logging.folder of its config)")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder of the report")
    add("--sweep", type=Path, metavar="SWEEP", help="file of a sweep, or name of a shipped one: show its cells too")
    add("--from", type=Path, metavar="FOLDER", dest="collected", help="--sweep: read its collected results there")
    add("--reference", metavar="VARIANT", help="compare the others with it (default: that of the sweep, or the first)")
    add("--prompt", nargs="+", metavar="TEXT", help="texts that the runs continue (default: four of ours)")
    add("--max-new-tokens", type=number(int, least=1), default=25, help="of a continuation (default: %(default)s)")
    add(
        "--temperature",
        type=number(float, least=0),
        default=0.0,
        help="of continuations (default: 0, the likeliest token)",
    )
    add("--seed", type=number(int, least=0, most=2**62), default=0, help="of continuations (default: %(default)s)")
    add("--text", help="text whose routes are shown (default: a sentence of ours)")
    add("--no-models", action="store_true", help="load no weights: no continuations, no heatmaps")
    add("--no-figures", action="store_true", help="draw no figures: needs no matplotlib")
    add("--overwrite", action="store_true", help="write to a folder that holds something else; other files stay")
    options = parser.parse_args(argv)
    if not options.runs and options.sweep is None:
        raise OptionError("megachiar report", "has neither RUN nor --sweep", f"name runs{parser.example('runs')}")
    if options.collected is not None and options.sweep is None:
        raise OptionError("--from", "has no effect without --sweep", "add --sweep or remove it")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.config.shipped import find_sweep
    from megachiar.config.sweep import load_sweep
    from megachiar.launch import quiet_deepspeed

    quiet_deepspeed()

    from megachiar.reporting.notes import Notes
    from megachiar.reporting.output import PAGE, check_output, write_report
    from megachiar.reporting.read_runs import read_runs
    from megachiar.reporting.report import ReportSettings, make_report

    console, notes = make_console(), Notes()
    sweep = None if options.sweep is None else load_sweep(find_sweep(options.sweep))
    check_output(options.output, options.overwrite, options.runs)
    runs = read_runs(options.runs, sweep, options.collected, notes)
    if not runs:
        raise UserError(options.sweep, "has no cell that has begun", "`megachiar sweep` trains them")
    settings = ReportSettings(
        reference=options.reference or reference_of(sweep, runs),
        looks=None if options.no_models else look_settings(options),
        has_figures=not options.no_figures,
    )
    files = make_report(runs, settings, notes, lambda line: console.print(line, style="dim", markup=False))
    write_report(options.output, files)
    for line in notes.lines:
        console.print(line, style="yellow", markup=False)
    console.print(f"wrote {options.output / PAGE}, with {len(files) - 1} files of tables and figures", markup=False)


def look_settings(options: argparse.Namespace) -> LookSettings:
    """Return how the models are looked at, with our own texts where the user gave none."""
    from megachiar.reporting.model_looks import PROMPTS, TEXT, LookSettings

    return LookSettings(
        prompts=options.prompt or PROMPTS,
        text=TEXT if options.text is None else options.text,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )


def reference_of(sweep: Sweep | None, runs: Sequence[ReportedRun]) -> str | None:
    """Return the variant that a sweep compares the others with; None for no sweep, or where it has no finished run."""
    finished = {run.name.variant for run in runs if run.result is not None}
    return sweep.reference if sweep is not None and sweep.reference in finished else None
