"""Check that an optional package of an extra is there and not too old, without the seconds that its import takes."""

from __future__ import annotations

import importlib.metadata
from itertools import takewhile

from megachiar.errors import UserError


def check_package(package: str, oldest: tuple[int, ...], extra: str, needed_by: str) -> None:
    """Check that a package is installed in a version that serves.

    Args:
        package: its name on PyPI.
        oldest: the parts of the oldest version that serves.
        extra: of megachiar, that installs the package.
        needed_by: the option or key that asks for it, to be named in an error.

    Raises:
        UserError: it is missing or too old.
    """
    remedy = install_command(extra)
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(needed_by, f"needs the package {package}, which is not installed", remedy) from None
    found = tuple(map(int, takewhile(str.isdigit, version.split(".")[: len(oldest)])))
    if found < oldest:
        wanted = ".".join(map(str, oldest))
        raise UserError(needed_by, f"needs {package} {wanted} or newer, not {version}", remedy)


def install_command(extra: str) -> str:
    """Return the command that installs an extra of megachiar."""
    return f"pip install 'megachiar[{extra}]'"
