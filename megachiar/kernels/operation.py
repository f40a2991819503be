"""Functions of tensors that ``torch.compile`` takes as one operation each, without looking into them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import library

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


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
        """Run the function, or note it in the graph that is being traced."""
        if torch.compiler.is_compiling():
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
