"""List the long-range tasks by name: the type of their settings, and what draws their examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megachiar.data.tasks.copying import CopySettings, copying
from megachiar.data.tasks.listops_distance import ListOpsDistanceSettings, listops_distance
from megachiar.data.tasks.long_range import LongRangeSettings
from megachiar.data.tasks.needle import NeedleSettings, needle
from megachiar.data.tasks.recall import RecallSettings, recall
from megachiar.data.tasks.task_corpus import Example

LONG_RANGE_TASKS: dict[str, tuple[type[LongRangeSettings], Callable[[Any], Iterator[Example]]]] = {
    "recall": (RecallSettings, recall),
    "copy": (CopySettings, copying),
    "needle": (NeedleSettings, needle),
    "listops-distance": (ListOpsDistanceSettings, listops_distance),
}
