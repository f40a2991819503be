"""Tables that are computed once for each size, device and type, and kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Table = TypeVar("Table")

_kept: list[Any] | None = None


@contextlib.contextmanager
def keep_tables() -> Iterator[list[Any]]:
    """Collect all tables that are looked up within, for what reads their memory later.

    A cache that is full gives its oldest tables up.
    """
    global _kept
    before, _kept = _kept, []
    try:
        yield _kept
    finally:
        _kept = before


def cached_table(make: Callable[Arguments, Table]) -> Callable[Arguments, Table]:
    """Wrap ``make`` so that it is called once for each set of arguments, which are hashable.

    Training may use a table that was first computed in inference. To ``torch.compile`` a table is a constant: traced,
    it would be computed in every call.
    """
    cached = functools.lru_cache(maxsize=32)(torch.inference_mode(False)(make))

    @functools.wraps(make)
    def get(*arguments: Arguments.args, **named: Arguments.kwargs) -> Table:
        table = cached(*arguments, **named)  # type: ignore[arg-type]  # a ParamSpec cannot say that all are hashable
        if _kept is not None:
            _kept.append(table)
        return table

    # torch.compile names a constant after the code that made it, and takes two of one name in a graph for one.
    get.__code__ = get.__code__.replace(co_name=make.__name__)  # type: ignore[attr-defined]
    get.cache_clear = cached.cache_clear  # type: ignore[attr-defined]  # mypy knows no attributes of functions
    return torch.compiler.assume_constant_result(get)
