"""Train the cells of a sweep one after another, each as a process of its own.

    cells in order --> finished? --> measured on its sources --> config written --> megachiar pretrain --> result

A cell whose run fails does not end the others. A signal is passed on to the run, which saves and stops; the sweep then
stops too, and goes on where it was when it is started again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from rich.markup import escape

import megachiar
from megachiar.checkpoint.format import named_checkpoints
from megachiar.checkpoint.removal import remove_checkpoint
from megachiar.config import ModelConfig
from megachiar.config.errors import ConfigError, Problem
from megachiar.config.sweep import Sweep
from megachiar.data.storage.files import sync_folder, write_atomically
from megachiar.errors import EXIT_STOPPED, UserError, disk_errors
from megachiar.sweeps.cells import Cell, cells_of
from megachiar.sweeps.measured import measure
from megachiar.sweeps.status import CellStatus, forget_failure, record_failure, running_process, status_of
from megachiar.training.continuation import open_run

EXIT_FAILED = 1
Outcome = Literal["finished", "running elsewhere", "failed", "stopped"]
_LAST_LINES = 12  # of a log, which are shown where a run failed
_LOOK_EVERY_S = 2.0  # at cells that another process trains
Log = Callable[[str], None]
"""Prints a line, in rich's markup."""


def check_cells(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Check the config of every variant and the data that it names, before anything is trained.

    Raises:
        ConfigError: names the problems of all variants together.
        UserError: a dataset is missing or does not fit, or ``launch`` names no program.
    """
    if sweep.config.launch:
        launch_words(sweep)
    located: list[tuple[str, Problem]] = []
    configs = []
    for cell in {cell.variant.name: cell for cell in cells}.values():
        try:
            configs.append((cell, cell.config()))
        except ConfigError as error:
            located += [entry for entry in error.located if entry not in located]
    if located:
        raise ConfigError(str(sweep.path), located)
    for cell, config in configs:
        _check_sources(cell, config.model)
        try:
            open_run(config)
        except UserError as error:
            raise UserError(f"{sweep.path}, {cell.variant.name}: {error.where}", error.problem, error.remedy) from error


def _check_sources(cell: Cell, model: ModelConfig) -> None:
    """Refuse sources whose models do not have what a cell with this model takes from them.

    Raises:
        UserError: H was measured on rows of another width or on other layers, or no layer of the source routes.
    """
    where, calibrate = f"{cell.sweep.path}, {cell.variant.name}", cell.variant.calibrate
    for source in cell.sources:
        name, other = source.variant.name, source.config().model
        if calibrate is not None and calibrate.run == name:
            keys = ["hidden_size", *(["num_layers"] if calibrate.where == "layers" else [])]
            for key in (key for key in keys if getattr(other, key) != getattr(model, key)):
                problem = f"{name} has model.{key} {getattr(other, key)}, and this variant {getattr(model, key)}"
                remedy = "name a variant of the same model.hidden_size, with layers also model.num_layers"
                raise UserError(f"{where}: calibrate.run", f"{problem}: a threshold belongs to one", remedy)
        if cell.variant.share_of == name and not other.routed_layers:
            raise UserError(f"{where}: share_of", f"no layer of {name} routes", "name a variant whose layers do")


def refuse_changed(statuses: Sequence[CellStatus]) -> None:
    """Refuse cells whose run folder holds a run of another config.

    Raises:
        UserError: names all of them.
    """
    changed = [status for status in statuses if status.state == "changed"]
    if not changed:
        return
    named = "; ".join(f"{status.cell.name} {status.detail}" for status in changed[:5])
    more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
    raise UserError(
        changed[0].cell.sweep.path,
        f"is not what these cells were trained by: {named}{more}",
        "set it back; or train them anew with --rerun-changed, which keeps the old runs under other names; or name "
        "another folder",
    )


def set_run_aside(cell: Cell) -> Path:
    """Rename the run folder of a cell, so that it is trained anew, and return the new path.

    Raises:
        UserError: the system refuses it.
    """
    number = 1
    while (target := cell.run.with_name(f"{cell.run.name}.set_aside_{number}")).exists():
        number += 1
    with disk_errors(cell.run):
        os.replace(cell.run, target)
        sync_folder(cell.run.parent)
    forget_failure(cell)
    return target


def prepare(cell: Cell, log: Log) -> Path:
    """Measure what is to be measured for a cell, and write the config of its run; return the config's path.

    Raises:
        UserError: a source is not finished, or ``measure`` raises it.
    """
    status = status_of(cell)
    if status.config is None:
        before = [status_of(source) for source in cell.sources]
        results = {s.cell.variant.name: s.result for s in before if s.result is not None}
        if len(results) < len(before):
            raise UserError(cell.name, f"waits {status.detail}", "start the sweep again when those are finished")
        found = measure(cell, results)
        values = ", ".join(f"{key} {value}" for key, value in found.keys.items())
        log(f"{escape(cell.name)}: measured {escape(values)}")
        if found.like_noise:
            log(
                f"[yellow]{escape(cell.name)}: H is distributed like that of white noise at "
                f"{escape(', '.join(found.like_noise))}: a threshold there routes at random[/]"
            )
        config = cell.config(found.keys)
    else:
        config = status.config
    path = cell.file(".yaml")
    write_atomically(path, config.to_yaml().encode())
    return path


def launch_words(sweep: Sweep) -> list[str]:
    """Return the words that start the ranks of a run, without the program and its options.

    A launcher is looked for beside this Python first, where an environment has its programs.

    Raises:
        UserError: there is no such program.
    """
    words = shlex.split(sweep.config.launch)
    if not words:
        return [sys.executable, "-u"]
    beside = Path(sys.executable).with_name(words[0])
    program = str(beside) if beside.exists() else shutil.which(words[0])
    if program is None:
        raise UserError(f"{sweep.path}: launch", f"there is no program {words[0]}", "install it, or correct the name")
    return [program, *words[1:]]


class SweepRunner:
    """Trains cells one after another.

    Attributes:
        stopped_by: the signal that asked the sweep to stop; None as long as there was none.

    Args:
        sweep: that the cells belong to.
        log: prints a line.
    """

    def __init__(self, sweep: Sweep, log: Log):
        self.stopped_by: str | None = None
        self._sweep, self._log = sweep, log
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, cells: Sequence[Cell]) -> int:
        """Train what is not finished of ``cells``; return 0, 1 if a cell failed, or 75 after a stop.

        Cells that another process trains, such as another start of the sweep, are waited for.
        """
        numbered, failed = [(f"[{number}/{len(cells)}] {cell.name}", cell) for number, cell in enumerate(cells, 1)], 0
        while numbered:
            later = []
            for head, cell in numbered:
                if self.stopped_by is not None:
                    self._log(f"stopped by a signal ({self.stopped_by})")
                    return EXIT_STOPPED
                outcome = self._run_cell(cell, head)
                if outcome == "stopped":
                    return EXIT_STOPPED
                if outcome == "running elsewhere":
                    later.append((head, cell))
                failed += outcome == "failed"
                if self._sweep.config.remove_checkpoints:
                    remove_needless_checkpoints(self._sweep)
            numbered = later
            self._wait_for_others(later)
        return EXIT_FAILED if failed else 0

    def _run_cell(self, cell: Cell, head: str) -> Outcome:
        """Train a cell if it is not finished."""
        status = status_of(cell)
        if status.state == "finished":
            self._log(f"{escape(head)}: finished already")
            return "finished"
        if status.state == "running" or (status.state == "waiting" and _waits_for_a_process(cell)):
            self._log(f"{escape(head)}: {status.state}, {escape(status.detail)}: it is looked at again at the end")
            return "running elsewhere"
        if status.state in ("waiting", "changed"):
            self._log(f"[yellow]{escape(head)}: left out: {status.state}, {escape(status.detail)}[/]")
            return "failed"
        return self._train(cell, head)

    def _wait_for_others(self, cells: Sequence[tuple[str, Cell]]) -> None:
        """Wait until one of the cells is not trained by another process any more, or a signal comes."""
        while cells and self.stopped_by is None:
            busy = (running_process(cell) or _waits_for_a_process(cell) for _, cell in cells)
            if not any(busy) or any(status_of(cell).state not in ("running", "waiting") for _, cell in cells):
                return
            time.sleep(_LOOK_EVERY_S)

    def _train(self, cell: Cell, head: str) -> Outcome:
        """Train one cell."""
        try:
            config = prepare(cell, self._log)
        except UserError as error:
            self._log(f"[bold red]{escape(head)}: {escape(str(error))}[/]")
            record_failure(cell, 2)
            return "failed"
        log = cell.file(".log")
        self._log(f"[bold]{escape(head)}[/]  {escape(str(log))}")
        forget_failure(cell)
        began = time.monotonic()
        code = self._start([*launch_words(self._sweep), _pretrain_file(), "--config", str(config)], log)
        took = f"{time.monotonic() - began:,.0f} s"
        if code == EXIT_STOPPED or (code != 0 and self.stopped_by is not None):
            self._log(f"{escape(head)}: stopped after {took}; the sweep goes on from there when it is started again")
            return "stopped"
        state = status_of(cell).state
        if state == "finished":
            self._log(f"{escape(head)}: finished in {took}" if code == 0 else f"{escape(head)}: another process did it")
            return "finished"
        if state == "running":  # it began a moment before, and the run here found its lock
            self._log(f"{escape(head)}: another process trains it: it is looked at again at the end")
            return "running elsewhere"
        self._log(f"[bold red]{escape(head)}: failed with exit code {code} after {took}; its log ends with[/]")
        for line in _last_lines(log):
            self._log(f"  {escape(line)}")
        record_failure(cell, code or EXIT_FAILED)
        return "failed"

    def _start(self, command: Sequence[str], log: Path) -> int:
        """Run a command to its end, with its output in ``log``; return its exit code, 128 + N after signal N."""
        with disk_errors(log), open(log, "ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            code = self._child.wait()
        finally:
            self._child = None
        return code if code >= 0 else 128 - code

    def pass_on_signals(self) -> None:
        """Pass signals that ask for a stop on to the run, from now on; those that are ignored stay so."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _frame: object) -> None:
        self.stopped_by = signal.Signals(number).name
        if self._child is not None:
            self._child.send_signal(number)


def _waits_for_a_process(cell: Cell) -> bool:
    """Return whether a process trains one of the cells that must be finished first, those of its sources included."""
    return any(running_process(source) or _waits_for_a_process(source) for source in cell.sources)


def remove_needless_checkpoints(sweep: Sweep) -> None:
    """Remove the checkpoints of finished cells on which no other cell has to be measured any more.

    Raises:
        UserError: one cannot be removed.
    """
    statuses = [status_of(cell) for cell in cells_of(sweep)]
    needed = {source.name for status in statuses if status.config is None for source in status.cell.sources}
    for status in statuses:
        if status.state == "finished" and status.cell.name not in needed:
            for checkpoint in named_checkpoints(status.cell.run / "checkpoints"):
                remove_checkpoint(checkpoint)


def _pretrain_file() -> str:
    """Return the file that launchers start."""
    return str(Path(megachiar.__file__).resolve().parent / "pretrain.py")


def _last_lines(log: Path) -> list[str]:
    with disk_errors(log, "read"), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 16)))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-_LAST_LINES:]
