"""Show where all ranks of a run are at the moment: what each does, and the Python stacks of its threads.

megachiar stacks runs/400m                   # one line a rank; the stacks are written to runs/400m/stacks/
megachiar stacks runs/400m --print           # print the stacks as well

Ranks on other machines answer too: the request is a file in the run folder. A rank that does not answer is stopped, or
holds the interpreter's lock.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

from megachiar.errors import UserError, disk_errors
from megachiar.options import CommandParser, number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("stacks", __doc__)
    parser.add_argument("run", type=Path, help="run folder (logging.folder of the config)")
    parser.add_argument(
        "--wait", type=number(float, least=0), default=15.0, help="seconds to wait for answers (default 15)"
    )
    parser.add_argument("--print", action="store_true", help="print the stacks as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Ask for stacks, wait for them and print a line for each rank.

    Returns:
        The exit code: 0 if all ranks have answered, else 1.

    Raises:
        UserError: no run works in the folder, or the folder cannot be written.
    """
    options = parse_arguments(argv)

    from megachiar.training.stacks import remove_request, request_stacks, stack_path

    ranks = ranks_at_work(options.run)
    with disk_errors(options.run):
        token = request_stacks(options.run)
    answers = wait_for_answers(options.run, token, ranks, options.wait)
    remove_request(options.run, token)
    for rank in range(ranks):
        print(answers[rank].split("\n", 1)[0] if rank in answers else f"rank {rank} has not answered")
        if options.print and rank in answers:
            print(answers[rank].split("\n", 1)[1])
    print(f"stacks are in {stack_path(options.run, 0).parent}/")
    return 0 if len(answers) == ranks else 1


def ranks_at_work(run: Path) -> int:
    """Return the number of ranks of the run that works in the folder.

    Raises:
        UserError: there is none.
    """
    from megachiar.training.run_lock import read_locks

    if not run.is_dir():
        raise UserError(run, "no such folder", "name the logging.folder of a run that trains now")
    owners = [lock.owner for lock in read_locks(run) if lock.owner is not None]
    at_work = [owner for owner in owners if owner.process.runs() is not False]
    if not at_work:
        raise UserError(run, "no run works in this folder", "name the logging.folder of a run that trains now")
    return at_work[-1].ranks


def wait_for_answers(run: Path, token: str, ranks: int, seconds: float) -> dict[int, str]:
    """Return what each rank has written for the request, a line about it and its stacks, by rank."""
    from megachiar.training.stacks import stack_path

    answers: dict[int, str] = {}
    until = time.monotonic() + seconds
    while len(answers) < ranks and time.monotonic() < until:
        time.sleep(0.1)
        for rank in range(ranks):
            if rank not in answers and (answer := read_answer(stack_path(run, rank), token)):
                answers[rank] = answer
    return answers


def read_answer(path: Path, token: str) -> str | None:
    """Return what the file holds for the request, None if it is not there or not whole yet."""
    from megachiar.data.storage.regular_file import read_regular

    try:
        text = read_regular(path).decode(errors="replace")
    except OSError:
        return None
    found = re.search(rf"^== [^\n]*?, (rank [^\n]*) \[asked for, {token}\]\n(.*?)^== end", text, re.M | re.S)
    return f"{found[1]}\n{found[2]}" if found else None
