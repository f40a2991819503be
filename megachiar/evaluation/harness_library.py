"""Say what to do where the library lm-evaluation-harness is missing, without the seconds that its import takes."""

from __future__ import annotations

import importlib.metadata

from megachiar.errors import UserError

INSTALL = "pip install 'megachiar[eval]'"
OLDEST = (0, 4, 13)
"""The oldest version that serves: it is the first that the tests ran with. The extra ``eval`` names it too."""


def check_library(needed_by: str) -> None:
    """Check that lm-evaluation-harness is installed and not too old.

    Args:
        needed_by: the option or key that asks for it, to be named in an error.

    Raises:
        UserError: it is missing or too old.
    """
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(needed_by, "needs the package lm-eval, which is not installed", INSTALL) from None
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise UserError(needed_by, f"needs lm-eval {wanted} or newer, not {version}", INSTALL)
