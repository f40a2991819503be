"""The base of every config section: typed, frozen, unknown keys refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One YAML mapping. Values are never changed after they are read.

    Strict: ``"3"`` is no integer and ``yes`` no number, so that a slip in the YAML is an error and not a surprise.
    A whole number is taken where a float is wanted, and a YAML list where a tuple is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
