"""Tell from which commit this code runs, where it runs from a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path


def own_commit() -> str | None:
    """Return the commit of the checkout that this code runs from; None where it is installed, or git is missing."""
    return checkout_commit(Path(__file__).resolve().parents[1])


def checkout_commit(root: Path) -> str | None:
    """Return the commit of the checkout at ``root``, with ``-dirty`` where files have changed since.

    None means that it is no checkout, or that git cannot read it.
    """
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # there is no git, or it refuses the checkout
        return None
