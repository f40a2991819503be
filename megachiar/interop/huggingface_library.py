"""Import the library transformers, the one place that does, and say what to do where it is missing."""

from __future__ import annotations

from typing import Any

from megachiar.errors import UserError
from megachiar.extras import check_package, install_command

OLDEST = (4, 56)
"""The oldest version that serves: it is the first whose ``from_pretrained`` and ``config.json`` know ``dtype``, and its
caches take tensors of any shape. The extra ``hf`` names it too."""


def check_library(needed_by: str) -> None:
    """Check that transformers is installed and not too old, without the seconds that its import takes.

    Args:
        needed_by: the option or key that asks for it, to be named in an error.

    Raises:
        UserError: it is missing or too old.
    """
    check_package("transformers", OLDEST, "hf", needed_by)


def import_transformers(needed_by: str) -> Any:
    """Return the module ``transformers``.

    Raises:
        UserError: it is missing, too old, or cannot be imported.
    """
    check_library(needed_by)
    try:
        import transformers
    except ImportError as error:
        problem = f"needs the package transformers, which cannot be imported: {error}"
        raise UserError(needed_by, problem, install_command("hf")) from None
    return transformers
