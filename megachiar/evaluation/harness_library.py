"""Say what to do where the library lm-evaluation-harness is missing, without the seconds that its import takes."""

from __future__ import annotations

from megachiar.extras import check_package

OLDEST = (0, 4, 13)
"""The oldest version that serves: it is the first that the tests ran with. The extra ``eval`` names it too."""


def check_library(needed_by: str) -> None:
    """Check that lm-evaluation-harness is installed and not too old.

    Args:
        needed_by: the option or key that asks for it, to be named in an error.

    Raises:
        UserError: it is missing or too old.
    """
    check_package("lm-eval", OLDEST, "eval", needed_by)
