"""Functions of tensors that a traced or recorded graph takes as one operation each, without looking into them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import library

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


_as_one = False


@contextlib.contextmanager
def as_one() -> Iterator[None]:
    """Let each operation reach torch's dispatcher as one, for a mode there to see it."""
    global _as_one
    before, _as_one = _as_one, True
    try:
        yield
    finally:
        _as_one = before


class Operation(Generic[Arguments, Result]):
    """A function without gradient that is one operation in a traced graph.

    Elsewhere it is called as it is: a call through torch's dispatcher would cost some 10 microseconds more.

    Args:
        body: the function. It may launch kernels and look up tables.
        name: the name of the operation.
        mutates_args: the names of the arguments that it writes to.
    """

    def __init__(self, body: Callable[Arguments, Result], name: str, mutates_args: Iterable[str]):
        self._body = body
        self._traced = library.custom_op(name, body, mutates_args=tuple(mutates_args))
        functools.update_wrapper(self, body)

    def __call__(self, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        """Run the function, or note it in the graph that is being traced or recorded."""
        if torch.compiler.is_compiling() or _as_one:
            return self._traced(*arguments, **named)
        return self._body(*arguments, **named)

    def register_fake(self, shapes: Callable) -> Callable:
        """Let ``shapes`` return what the function would, with shapes and types alone."""
        return self._traced.register_fake(shapes)


def operation(
    name: str, mutates_args: Iterable[str] = ()
) -> Callable[[Callable[Arguments, Result]], Operation[Arguments, Result]]:
    """Make the decorated function an ``Operation``, whose arguments these are."""
    return lambda body: Operation(body, name, mutates_args)
