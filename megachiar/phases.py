"""Name the parts of a step in the traces of PyTorch's profiler: forward, route, attention, dct, loss, save, ...

Outside a profile a name costs the test of a flag: no operation is added.
"""

from __future__ import annotations

import contextlib

import torch
from torch.autograd import profiler

_UNNAMED = contextlib.nullcontext()


def phase(name: str) -> contextlib.AbstractContextManager[object]:
    """Return a context whose operations stand below ``name`` in a trace, while a profiler records this process.

    Within a compiled graph it names nothing, for the graph to be the same with and without a profiler.
    """
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return _UNNAMED
    return torch.profiler.record_function(name)
