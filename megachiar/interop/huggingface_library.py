"""Import the library transformers, the one place that does, and say what to do where it is missing."""

from __future__ import annotations

from typing import Any

from megachiar.errors import UserError

INSTALL = "pip install 'megachiar[hf]'"
OLDEST = (4, 56)
"""The oldest version whose caches take what the exported model keeps; the extra ``hf`` names it too."""


def import_transformers(needed_by: str) -> Any:
    """Return the module ``transformers``.

    Args:
        needed_by: the option or key that asks for it, to be named in an error.

    Raises:
        UserError: it is not installed, cannot be imported, or is too old.
    """
    try:
        import transformers
    except ImportError as error:
        problem = f"needs the package transformers, which cannot be imported: {error}"
        raise UserError(needed_by, problem, INSTALL) from None
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise UserError(needed_by, f"needs transformers {wanted} or newer, not {transformers.__version__}", INSTALL)
    return transformers
