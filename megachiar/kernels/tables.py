"""Tables that are computed once for each size, device and type, and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Table = TypeVar("Table")


def cached_table(make: Callable[Arguments, Table]) -> Callable[Arguments, Table]:
    """Wrap ``make`` so that it is called once for each set of arguments, which are hashable.

    Training may use a table that was first computed in inference. To ``torch.compile`` a table is a constant: traced,
    it would be computed in every call.
    """
    cached = functools.lru_cache(maxsize=32)(torch.inference_mode(False)(make))

    @functools.wraps(make)
    def get(*arguments: Arguments.args, **named: Arguments.kwargs) -> Table:
        return cached(*arguments, **named)  # type: ignore[arg-type]  # a ParamSpec cannot say that all are hashable

    # torch.compile names a constant after the code that made it, and takes two of one name in a graph for one.
    get.__code__ = get.__code__.replace(co_name=make.__name__)  # type: ignore[attr-defined]
    get.cache_clear = cached.cache_clear  # type: ignore[attr-defined]  # mypy knows no attributes of functions
    return torch.compiler.assume_constant_result(get)
