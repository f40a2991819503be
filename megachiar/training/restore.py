"""Load into the engine what its run starts from."""

from __future__ import annotations

from collections.abc import Callable

from rich.markup import escape

from megachiar.checkpoint.resume import load_weights, resume
from megachiar.engine.engine import Engine
from megachiar.training.continuation import Continuation


def restore(engine: Engine, run: Continuation, log: Callable[[str], None]) -> None:
    """Load the checkpoint that ``run`` starts from into ``engine``, if there is one; every rank calls this function.

    Args:
        engine: with initial weights.
        run: at its start.
        log: prints a line of the log.
    """
    if run.start.path is None or run.state is None:
        return
    if run.start.kind == "weights":
        for name in load_weights(engine, run.start.path, run.data.classes()):
            log(f"classification head {name} starts with initial weights: the checkpoint has none like it")
    else:
        resume(engine, run.start.path, run.state)
    log(escape(run.summary))
    for line in run.warnings:
        log(f"[yellow]  {escape(line)}[/]")
