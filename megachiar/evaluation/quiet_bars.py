"""Keep the harness's progress bars off the terminal and the log: it has no option for it, and ours tell the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Build the requests of tasks without a bar in this block."""
    from lm_eval.api import task

    before = task.tqdm
    task.tqdm = _plain
    try:
        yield
    finally:
        task.tqdm = before


def _plain(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items
