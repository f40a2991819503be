"""The one exception for what a user can mend: a config, a file, a launch.

Every entry point turns it into one message and exit code 2 (see ``megachiar.console.run``); everything else is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """A problem that its reader can mend.

    Args:
        where: file, key path, byte or rank the problem is at, such as ``"configs/a.yaml: model.tau"``.
        problem: what is wrong, with the offending value and the limit it broke.
        remedy: what to do about it.
    """

    same_on_every_rank = False
    """True where each rank of a run meets the same error, so that one report is enough."""

    def __init__(self, where: object, problem: str, remedy: str = ""):
        self.where, self.problem, self.remedy = str(where), problem, remedy
        super().__init__(f"{where}: {problem}" + (f"\n    remedy: {remedy}" if remedy else ""))

    def __reduce__(self):  # ValueError would be rebuilt from the one joined string
        return type(self), (self.where, self.problem, self.remedy)


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk under ``path`` into a ``UserError`` that names it."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space there or write somewhere else",
            errno.EDQUOT: "free some of your quota or write somewhere else",
            errno.EROFS: "write to a folder that is not mounted read-only",
            errno.EACCES: "change the permissions or write somewhere else",
            errno.ENOTDIR: "a file stands where a folder is needed: move it or choose another path",
            errno.EEXIST: "a file stands where a folder is needed: move it or choose another path",
            errno.EISDIR: "a folder stands where a file is needed: move it or choose another path",
            errno.EFBIG: "raise the file size limit (ulimit -f) or write smaller files",
        }
        if error.errno not in remedies:
            raise
        raise UserError(error.filename or path, f"cannot write: {error.strerror}", remedies[error.errno]) from error
