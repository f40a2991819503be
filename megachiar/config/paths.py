"""Paths in a config: ``~`` is the home folder, and ``$NAME`` or ``${NAME}`` an environment variable."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand_path(path: Path) -> Path:
    """Return ``path`` with the home folder and environment variables in place of their names.

    Raises:
        PydanticCustomError: a variable is not set, or there is no such user.
    """
    text = str(path)
    for match in _VARIABLE.finditer(text):
        name = match[1] or match[2]
        if name not in os.environ:
            message = "a path whose variables are all set; {name} is not"
            raise PydanticCustomError("unset_variable", message, {"name": name})
    try:
        return Path(os.path.expandvars(text)).expanduser()
    except RuntimeError:
        raise PydanticCustomError("no_home", "a path in the home folder of a user of this machine") from None


ConfigPath = Annotated[Path, AfterValidator(expand_path)]
"""The path of a config's key. The resolved config holds it expanded."""
