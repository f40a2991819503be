"""Look at the checkpoints of a run, compare two of them, and remove some.

    megachiar checkpoint list runs/tiny                   # step, date, size, layout, and what is damaged
    megachiar checkpoint verify runs/tiny                 # compare every file with its checksum
    megachiar checkpoint show runs/tiny                   # its record and its tensors
    megachiar checkpoint diff runs/a runs/b               # which tensors differ, and by how much
    megachiar checkpoint prune runs/tiny --keep 3 --keep-every 1000 --dry-run

RUN is a run folder or one of its checkpoints; show and diff take the newest whole checkpoint of a run folder. One
tensor of a checkpoint is in memory at a time. prune never removes the newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachiar.console import make_console, print_warning
from megachiar.errors import UserError
from megachiar.options import CommandParser, Parser, add_json_option

if TYPE_CHECKING:  # torch is imported by the actions that need it
    from rich.table import Table

    from megachiar.checkpoint.format import CheckpointState
    from megachiar.checkpoint.inspection import TensorDifference


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("checkpoint", __doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    for name, what in (
        ("list", "list the checkpoints of a run"),
        ("verify", "compare every file of one checkpoint, or of all of a run, with its checksum"),
        ("show", "show the record and the tensors of a checkpoint"),
        ("diff", "show which tensors of two checkpoints differ, and by how much"),
    ):
        action = actions.add_parser(name, help=what)
        action.add_argument("run", type=Path, metavar="RUN", help="run folder, or one checkpoint of it")
        if name == "diff":
            action.add_argument("other", type=Path, metavar="OTHER", help="run folder or checkpoint to compare with")
        add_json_option(action)
    prune = actions.add_parser("prune", help="remove checkpoints of a run")
    prune.add_argument("run", type=Path, metavar="RUN", help="run folder")
    prune.add_argument("--keep", type=int, metavar="N", help="keep the newest N")
    prune.add_argument("--keep-every", type=int, metavar="N", help="keep those whose step is a multiple of N")
    prune.add_argument(
        "--keep-best",
        nargs="+",
        metavar="SET",
        help="keep the best on each of these validation sets or tasks' measures",
    )
    prune.add_argument("--steps", type=steps_of, metavar="A,B", help="remove exactly these steps")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser.parse_args(argv)


def steps_of(text: str) -> list[int]:
    """Return the steps of ``--steps``."""
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of steps such as 100,200") from None


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    actions = {
        "list": list_checkpoints,
        "verify": verify_checkpoints,
        "show": show_checkpoint,
        "diff": diff_checkpoints,
        "prune": prune_checkpoints,
    }
    actions[options.action](options)


def list_checkpoints(options: argparse.Namespace) -> None:
    from rich.markup import escape
    from rich.table import Table

    from megachiar.checkpoint.inspection import checkpoints_at, summarise

    found = [summarise(path) for path in checkpoints_at(options.run)]
    if options.json:
        print_json([dataclasses.asdict(summary) for summary in found])
        return
    table = Table(title=str(options.run), title_justify="left")
    for name in ("step", "written", "MiB", "layout", "state"):
        table.add_column(name, justify="right" if name in ("step", "MiB") else "left")
    for summary in found:
        written = f"{summary.written:%Y-%m-%d %H:%M:%S}" if summary.written else "-"
        size = "-" if summary.size is None else f"{summary.size / 2**20:,.1f}"
        step = "-" if summary.step is None else f"{summary.step:,}"
        table.add_row(step, written, size, escape(summary.layout or "-"), escape(summary.problem or "complete"))
    make_console(sys.stdout).print(table)


def verify_checkpoints(options: argparse.Namespace) -> None:
    from megachiar.checkpoint.inspection import checkpoints_at, damage_or_version
    from megachiar.checkpoint.verify import verify_alone

    paths = checkpoints_at(options.run)
    problems = {path: damage_or_version(path) or verify_alone(path) for path in paths}
    if options.json:
        print_json({str(path): problem for path, problem in problems.items()})
    else:
        for path, problem in problems.items():
            print(f"{path}: {problem or describe_whole(path)}")
    damaged = [path for path, problem in problems.items() if problem]
    if damaged:
        raise UserError(
            options.run, f"{len(damaged)} of {len(paths)} checkpoints are not whole", "put back an undamaged copy"
        )


def describe_whole(checkpoint: Path) -> str:
    from megachiar.checkpoint.format import read_state, unlisted_files

    state = read_state(checkpoint)
    unlisted = unlisted_files(checkpoint, state)
    known = "" if state.checksums else " as far as sizes tell: format_version 3 has no checksums"
    return f"whole{known}" + (f"; it does not list, and nobody reads, {', '.join(unlisted)}" if unlisted else "")


def show_checkpoint(options: argparse.Namespace) -> None:
    from rich.table import Table

    from megachiar.checkpoint.format import read_state
    from megachiar.checkpoint.inspection import describe_tensors
    from megachiar.checkpoint.reading import locate_checkpoint

    checkpoint = locate_checkpoint(options.run, log=print_warning)
    state = read_state(checkpoint)
    if options.json:
        tensors = [dataclasses.asdict(tensor) for tensor in describe_tensors(checkpoint)]
        print_json({"checkpoint": str(checkpoint), "state": state.model_dump(mode="json"), "tensors": tensors})
        return
    print_state(checkpoint, state)
    table = Table("tensor", "shape", "dtype")
    table.add_column("norm", justify="right")
    for tensor in describe_tensors(checkpoint):
        table.add_row(tensor.name, " x ".join(map(str, tensor.shape)), tensor.dtype, f"{tensor.norm:.6g}")
    make_console(sys.stdout).print(table)


def print_state(checkpoint: Path, state: CheckpointState) -> None:
    print(checkpoint)
    for name, value in state.model_dump(mode="json", exclude={"files", "checksums", "data"}).items():
        print(f"  {name}: {value}")
    for source in state.data.sources:
        print(f"  data: {source.path}, {source.tokens:,} tokens")
    for name, size in state.files.items():
        print(f"  {name}: {size:,} bytes" + (f", XXH3-128 {state.checksums[name]}" if state.checksums else ""))


def diff_checkpoints(options: argparse.Namespace) -> None:
    from megachiar.checkpoint.inspection import compare
    from megachiar.checkpoint.reading import locate_checkpoint

    one, other = (locate_checkpoint(path, log=print_warning) for path in (options.run, options.other))
    compared = list(compare(one, other))
    different = [difference for difference in compared if difference is not None]
    equal = len(compared) - len(different)
    if options.json:
        print_json({"tensors": len(compared), "equal": equal, "different": [*map(dataclasses.asdict, different)]})
        return
    if different:
        make_console(sys.stdout).print(difference_table(f"{one} against {other}", different))
    print(f"{equal:,} of {len(compared):,} tensors are equal in every bit")


def difference_table(title: str, different: list[TensorDifference]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("tensor")
    for name in ("largest difference", "norm of the difference / norm"):
        table.add_column(name, justify="right")
    for tensor in different:
        values = (tensor.problem, "") if tensor.problem else (f"{tensor.largest:.3g}", f"{tensor.relative:.3g}")
        table.add_row(tensor.name, *values)
    return table


def prune_checkpoints(options: argparse.Namespace) -> None:
    from megachiar.checkpoint.removal import remove_checkpoint, to_prune
    from megachiar.training.incident_record import checkpoint_to_spare

    rules = {"keep": options.keep, "keep_every": options.keep_every, "keep_best": options.keep_best}
    if all(rule is None for rule in rules.values()) != (options.steps is not None):
        raise UserError(
            "megachiar checkpoint prune", "needs a rule", "give --keep, --keep-every, --keep-best, or --steps"
        )
    for name in ("keep", "keep_every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}", "must be at least 1", "change it")
    folder = options.run / "checkpoints" if (options.run / "checkpoints").is_dir() else options.run
    rules["keep_best"] = options.keep_best or ()
    doomed = to_prune(folder, **rules, steps=options.steps or ())
    spared = None if options.steps else checkpoint_to_spare(options.run)
    for path in [path for path in doomed if path.name == spared]:
        print(f"kept {path}: `megachiar replay` of the newest incident starts from it; --steps removes it too")
        doomed.remove(path)
    for path in doomed:
        if not options.dry_run:
            remove_checkpoint(path)
        print(f"{'would remove' if options.dry_run else 'removed'} {path}")
    if not doomed:
        print("nothing to remove")


def print_json(value: Any) -> None:
    print(json.dumps(value, default=str))
