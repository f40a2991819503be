"""The base class of every config section, which is typed, is frozen and refuses unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One mapping of the YAML file. Its values never change after they are read.

    Types are strict: ``"3"`` is no integer and ``yes`` no boolean, so that a slip in the YAML is an error. An integer
    counts as a float, and a YAML list as a tuple. Infinity and NaN are no numbers.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
