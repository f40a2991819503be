"""Capture of operations that are run again later on the same memory: as a CUDA graph, or recorded on a CPU.

    capture   run() once: its operations are noted, with the memory that they read and write
    replay    the same operations on the same memory, without any Python of ``run``

Whoever replays writes new numbers into the tensors that ``run`` read, and finds the results in those that it returned.
A CPU has no graphs. There each operation is called again and its result copied to where the first one lies, so that
tests meet what a GPU would do to a number of the host: it stays what it was at the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megachiar.kernels import operation
from megachiar.kernels.tables import keep_tables

Result = TypeVar("Result")
WAITS = frozenset(
    (
        *("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "bincount"),
        *("masked_select", "masked_scatter", "_unique2", "unique_consecutive"),
    )
)
"""Operations whose result a host has to wait for, which no graph can hold."""


class Capturer(Protocol):
    """Captures operations of one device."""

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Capture the operations of ``run``.

        Returns:
            A function that replays them, and what ``run`` returned, whose tensors each replay fills anew. They hold
            nothing before the first replay.

        Raises:
            RuntimeError: an operation cannot be captured.
        """


def capturer(device: torch.device) -> Capturer:
    """Return what captures operations on ``device``."""
    return CudaGraphs() if device.type == "cuda" else OperationRecorder()


class CudaGraphs:
    """Captures operations as CUDA graphs, which share one pool of memory.

    What one graph frees during its capture the graphs after it may take. They are therefore replayed in the order of
    their captures, and results that are needed later are kept by whoever has them.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Capture the operations of ``run``: see ``Capturer``."""
        graph = torch.cuda.CUDAGraph()
        # Threads that load data and watch collectives go on meanwhile.
        with (
            keep_tables() as tables,
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = run()
        return _Replay(graph.replay, tables), result


class OperationRecorder:
    """Captures the operations of a CPU by writing them down."""

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Capture the operations of ``run``: see ``Capturer``."""
        recorded = _Recording()
        with keep_tables() as tables, operation.as_one(), recorded:
            result = run()
        return _Replay(recorded.replay, tables), result


@dataclass(frozen=True)
class _Replay:
    """A replay, and the tables that its operations read, which a cache would give up otherwise."""

    run: Callable[[], None]
    tables: list[Any]

    def __call__(self) -> None:
        self.run()


class _Call(NamedTuple):
    """A call of an operation.

    Attributes:
        function, arguments, named: what was called.
        results: its tensors that no argument shares its memory with, into which each replay copies new ones.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    results: list[tuple[int, torch.Tensor]]


class _Recording(TorchDispatchMode):
    """Writes down the operations that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = function._schema.name.partition("::")[2]
        named = kwargs or {}
        if name in WAITS or _has_unknown_shape(name, args, named):
            raise RuntimeError(f"{name}: the host would wait for the device")
        returned = function(*args, **named)
        aliases = [result.alias_info for result in function._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return returned  # a view: it has no memory of its own
        tensors = enumerate(returned if isinstance(returned, tuple | list) else (returned,))
        results = [] if any(aliases) else [(index, value) for index, value in tensors if torch.is_tensor(value)]
        self._calls.append(_Call(function=function, arguments=args, named=named, results=results))
        return returned

    @torch.no_grad()
    def replay(self) -> None:
        for call in self._calls:
            returned = call.function(*call.arguments, **call.named)
            values = returned if isinstance(returned, tuple | list) else (returned,)
            for index, result in call.results:
                result.copy_(values[index])


def _has_unknown_shape(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Return whether the shape of an operation's result hangs on values, so that a device has to tell it."""
    if name == "repeat_interleave":
        return torch.is_tensor(arguments[-1]) and named.get("output_size") is None
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
