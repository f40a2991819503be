"""Queue the cells of a sweep as Slurm arrays: task i trains cell i of a list, on all ranks of its job.

    array of cells without sources --afterany--> array of cells that are measured on those --afterany--> ...

``slurm/sweep.sh`` is the script of a task. Cells that are finished are not queued. A cell whose source has failed ends
with a message; the same call queues what is missing once that is mended.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megachiar.config.sweep import Sweep
from megachiar.data.storage.files import write_atomically
from megachiar.errors import UserError
from megachiar.sweeps.cells import Cell, levels_of
from megachiar.sweeps.status import CellStatus

SCRIPT = Path("slurm/sweep.sh")
JOBS_FILE, CELLS_FILE = "slurm.jobs", "slurm.cells"


def submit(sweep: Sweep, statuses: Sequence[CellStatus]) -> list[str]:
    """Queue the cells that are neither finished nor running; return a line for each array.

    Raises:
        UserError: this is not the folder of a checkout, Slurm is missing or refuses a job, or jobs of an earlier call
            are still queued.
    """
    if not SCRIPT.exists():
        raise UserError(Path.cwd(), f"holds no {SCRIPT}", "start it in the checkout of megachiar")
    folder = sweep.config.folder
    _refuse_queued(folder)
    cells = [status.cell for status in statuses if status.state not in ("finished", "running")]
    if not cells:
        return [f"every cell of {sweep.path} is finished or running: nothing was queued"]
    listed = "".join(f"{cell.name}\n" for cell in cells)
    write_atomically(folder / CELLS_FILE, listed.encode())
    lines, jobs = [], []
    before: str | None = None
    try:
        for level in levels_of(cells):
            job = _sbatch(sweep, [cells.index(cell) for cell in level], before)
            lines.append(f"job array {job} trains {_names(level)}" + (f", after {before}" if before else ""))
            jobs.append(job)
            before = job
    except UserError:
        for job in jobs:  # or the next call would start them a second time
            _run(["scancel", job])
        raise
    write_atomically(folder / JOBS_FILE, ",".join(jobs).encode() + b"\n")
    return lines


def _sbatch(sweep: Sweep, numbers: Sequence[int], after: str | None) -> str:
    """Queue one array and return the number of its job."""
    command = ["sbatch", "--parsable", f"--array={','.join(map(str, numbers))}", *shlex.split(sweep.config.slurm)]
    if after is not None:
        command += [f"--dependency=afterany:{after}", "--kill-on-invalid-dep=yes"]
    output = _run([*command, str(SCRIPT), str(sweep.path), str(sweep.config.folder / CELLS_FILE)])
    return output.strip().partition(";")[0]


def _refuse_queued(folder: Path) -> None:
    path = folder / JOBS_FILE
    if not path.exists():
        return
    jobs = path.read_text(encoding="utf-8").strip()
    asked = subprocess.run(["squeue", "--noheader", f"--jobs={jobs}"], capture_output=True, text=True)
    if asked.returncode == 0 and asked.stdout.strip():
        raise UserError(folder, f"jobs {jobs} still work on it", "wait for them, or scancel them first")


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(command[0], "is not on this machine", "start --slurm where Slurm's commands are") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(shlex.join(command), f"failed: {said}", "mend that, and start it again")
    return done.stdout


def _names(cells: Sequence[Cell]) -> str:
    shown = ", ".join(cell.name for cell in cells[:4])
    return f"{len(cells)} cells ({shown}{', ...' if len(cells) > 4 else ''})"
