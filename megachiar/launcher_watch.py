"""A rank whose launcher was killed ends by itself.

A killed launcher cannot end its ranks. They would hold GPUs, ports and the run folder, and the next start would meet
them. So a thread looks every second whether each process between this one and its launcher is still there:

    torchrun    rank <- torchrun                  srun      rank <- bash slurm/task.sh <- slurmstepd
    deepspeed   rank <- launch.py <- deepspeed    mpirun    rank <- hydra_pmi_proxy <- mpiexec
    a sweep     rank <- megachiar sweep, or one of these launchers in between

A process that no launcher of this list started is left alone: a shell that starts a run and ends, as with nohup, is
no launcher.
"""

from __future__ import annotations

import os
import re
import threading

from megachiar.last_words import print_last_words
from megachiar.process_identity import ProcessIdentity, command_of, parent_of

EXIT_LAUNCHER_LOST = 1
INTERVAL_S = 1.0
_LAUNCHER = re.compile(
    r"((^|/)(torchrun|deepspeed|slurmstepd:|hydra_pmi_proxy|hydra_bstrap_proxy|mpiexec(\.hydra)?|mpirun|orted|prted)"
    r"|torch[./]distributed[./](run|launch)(\.py)?|deepspeed[./]launcher[./](launch|runner)(\.py)?)$"
)
_SWEEP = re.compile(r"(^|/)megachiar sweep( |$)|(^|/)tools/sweep\.py( |$)")
_HIGHEST = 8  # processes above this one that are looked at


def find_launcher(pid: int) -> list[ProcessIdentity]:
    """Return the processes from the parent of ``pid`` up to its launcher; empty if no launcher started it.

    Of several launchers, such as torchrun below srun, the highest counts.
    """
    above: list[ProcessIdentity] = []
    until = 0
    while len(above) < _HIGHEST and (parent := parent_of(pid)) and parent > 1:
        above.append(ProcessIdentity.of(parent))
        program = _program(command_of(parent))
        if _LAUNCHER.search(program.partition(" ")[0]) or _SWEEP.search(program):
            until = len(above)
        pid = parent
    return above[:until]


def _program(command: str) -> str:
    """Return the program that a command line runs, with its arguments; of an interpreter what it was given to run.

    The words after it may name a launcher without being one, as in ``vim torchrun.txt`` or ``bash -c "torchrun &"``.
    """
    first, *words = command.split() or [""]
    if not re.search(r"(python[\d.]*|sh)$", first):
        return " ".join([first, *words])
    place = next((place for place, word in enumerate(words) if not word.startswith("-")), len(words))
    return "" if "-c" in words[:place] else " ".join(words[place:])


class LauncherWatch:
    """Watch the launcher of this process, from a thread, until the process ends.

    Attributes:
        chain: the processes from this one's parent up to the launcher; empty if no launcher started it.
    """

    def __init__(self) -> None:
        self.chain = find_launcher(os.getpid())

    def start(self) -> None:
        """Begin to watch, if there is a launcher."""
        if self.chain:
            threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()

    def lost(self) -> ProcessIdentity | None:
        """Return the process that is gone between this one and its launcher, the launcher included; None if none is."""
        if os.getppid() != self.chain[0].pid:
            return self.chain[0]
        return next((process for process in self.chain if process.runs() is False), None)

    def _watch(self) -> None:
        pause = threading.Event()
        while (lost := self.lost()) is None:
            pause.wait(INTERVAL_S)
        rank = os.environ.get("RANK", "0")
        print_last_words(f"error: rank {rank} stops: its launcher ({lost}) is gone")
        os._exit(EXIT_LAUNCHER_LOST)
