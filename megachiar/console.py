"""Messages go to one console on standard error, and every program ends here.

Standard output is kept for results (``--json``, a sample). Everything else goes to standard error, from rank 0 only.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from megachiar.errors import EXIT_USER_ERROR, UserError, disk_error
from megachiar.printed_messages import print_once
from megachiar.process_identity import ProcessIdentity

if TYPE_CHECKING:
    from rich.console import Console  # imported where it is used, since a program that writes one line needs no console

EXIT_INTERRUPTED = 128 + signal.SIGINT
# Variables by which torchrun or DeepSpeed, Open MPI, MPICH and srun say how many processes they start.
_NUMBERS_OF_RANKS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def global_rank() -> int:
    """Return the rank of this process as its launcher set it, 0 when there is no launcher.

    A ``RANK`` that is no number counts as 0: messages are shown. Where ranks meet, ``launch`` refuses it.
    """
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def make_console(file: TextIO | None = None) -> Console:
    """Return a console that does not break lines in log files and is silent on ranks but 0.

    Args:
        file: that it writes to; standard error if None.
    """
    from rich.console import Console

    width = None if (file or sys.stderr).isatty() else 200
    return Console(
        file=file, stderr=file is None, width=width, soft_wrap=True, highlight=False, quiet=global_rank() != 0
    )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Drop the output of a library in this block, such as memory tables and progress bars. Errors are still raised."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def print_warning(line: str) -> None:
    """Print a line on standard error, in yellow on a terminal."""
    make_console().print(line, style="yellow", markup=False)


def _plain_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False)


def _ranks_have_met() -> bool:
    """Return whether this process has joined the others in a process group; torch is not imported to find out."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def report(error: UserError) -> None:
    """Print ``error`` on the rank that met it, or once where several ranks meet the same.

    Once the ranks have met, rank 0 prints what every rank meets. Before that no rank knows what the others meet: of the
    ranks of one machine the first that has a message prints it, and the others see that it did.
    """
    from rich.markup import escape

    rank = global_rank()

    def show() -> None:
        maybe_others = ", perhaps others too" if error.same_on_every_rank else ""
        prefix = f"[rank {rank}{maybe_others}] " if rank else ""
        _plain_console().print(f"[bold red]error:[/] {escape(prefix + str(error))}")

    if _ranks_have_met():
        if rank == 0 or not error.same_on_every_rank:
            show()
    elif _has_peers():
        print_once(str(error), _this_start(), ProcessIdentity.of(os.getpid()).seconds_since_boot, show)
    else:
        show()


def _has_peers() -> bool:
    """Return whether a launcher says that it started several ranks."""
    return any(os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1 for name in _NUMBERS_OF_RANKS)


def _this_start() -> str:
    """Return a text that only the ranks of this start have: their rendezvous, Slurm's step, or else their parent."""
    for names in (("MASTER_ADDR", "MASTER_PORT"), ("SLURM_JOB_ID", "SLURM_STEP_ID")):
        if all(name in os.environ for name in names):
            return " ".join(f"{name}={os.environ[name]}" for name in names)
    return f"parent {os.getppid()}"


def run(main: Callable[[], int | None]) -> None:
    """Call ``main`` and exit with its value (None is 0), with 2 after a ``UserError``, and with 130 after Ctrl-C.

    A path that the system refuses counts as a ``UserError``. A file that is missing does not: our own code asks first.
    """
    with contextlib.suppress(AttributeError, OSError):  # it may have been replaced, or be a file of another kind
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for paths that are no UTF-8
    try:
        code = main()
    except UserError as error:
        report(error)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        _plain_console().print("interrupted")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # in `tool | head` the reader has read all that it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.filename is None or error.errno == errno.ENOENT:
            raise
        report(disk_error(error.filename, error, "read or write"))
        code = EXIT_USER_ERROR
    sys.exit(code)
