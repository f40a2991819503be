"""One exception serves everything that a user can mend: a config, a file, a launch.

Every entry point turns it into one message and exit code 2 (see ``megachiar.console.run``). Every other exception is a
defect of this project and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Exit code after a signal or a limit of time made the run save and stop: EX_TEMPFAIL, "start me again"."""


class UserError(ValueError):
    """A problem that its reader can mend.

    Args:
        where: file, key path, byte or rank of the problem, such as ``"configs/a.yaml: model.tau"``.
        problem: in words, with the value and the limit that it breaks.
        remedy: the action that the reader can take.
    """

    same_on_every_rank = False
    """Whether every rank of a run meets the same error, so that one report is enough."""

    def __init__(self, where: object, problem: str, remedy: str = ""):
        self.where, self.problem, self.remedy = str(where), problem, remedy
        super().__init__(f"{where}: {problem}" + (f"\n    remedy: {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[Any, ...]:  # ValueError would be rebuilt from the joined message alone
        return type(self), (self.where, self.problem, self.remedy)


WRITE_REMEDIES = {
    errno.ENOSPC: "free some space there or write somewhere else",
    errno.EDQUOT: "free some of your quota or write somewhere else",
    errno.EROFS: "write to a folder that is not mounted read-only",
    errno.EACCES: "change the permissions or write somewhere else",
    errno.EPERM: "change the permissions or write somewhere else",
    errno.ENOENT: "name a folder that can hold new files, and leave it alone while this runs",
    errno.ENOTDIR: "a file stands where a folder is needed: move it or choose another path",
    errno.EEXIST: "a file stands where a folder is needed: move it or choose another path",
    errno.EISDIR: "a folder stands where a file is needed: move it or choose another path",
    errno.EFBIG: "raise the file size limit (ulimit -f) or write smaller files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the link",
}
READ_REMEDIES = {
    errno.EACCES: "make it readable",
    errno.EPERM: "make it readable",
    errno.ENOENT: "check the path, and leave the file alone while this runs",
    errno.ELOOP: "mend the link",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EISDIR: "give the path of a file",
    errno.ENODEV: "put the file itself there, or give its path",
    errno.ENOTDIR: "a file stands where a folder is needed: move it or choose another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def disk_error(path: Path | str, error: OSError, verb: str = "write") -> UserError:
    """Return the message for an error of the system, with file, operation and remedy.

    Args:
        path: the file, where ``error`` itself names none.
        error: the one that the system raised.
        verb: the operation that it refused.
    """
    where = error.filename if isinstance(error.filename, str | os.PathLike) else path
    remedies = READ_REMEDIES if verb == "read" else WRITE_REMEDIES
    remedy = remedies.get(error.errno or 0, "check the disk and its connection; the system's log (dmesg) tells more")
    return UserError(where, f"cannot {verb}: {error.strerror or error}", remedy)


@contextmanager
def disk_errors(path: Path | str, verb: str = "write") -> Iterator[None]:
    """Turn an error of the system in this block into a ``UserError`` that names ``path`` and the operation ``verb``."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, verb) from error
