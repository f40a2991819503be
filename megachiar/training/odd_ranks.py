"""Say which ranks differ from the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)
_NAMED = 8
"""Ranks that a message names one by one."""


def odd_groups(values: Sequence[Value]) -> tuple[list[tuple[Value, list[int]]], tuple[Value, list[int]]]:
    """Group the indices of ``values`` by value.

    Returns:
        The groups that differ from the largest one, each as (value, indices), and the largest one. Of equally large
        groups the one of the first index counts as the largest.
    """
    groups: dict[Value, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        groups[value].append(index)
    usual = max(groups.items(), key=lambda group: len(group[1]))
    return [group for group in groups.items() if group[0] != usual[0]], usual


def describe_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return ranks with their hosts for a message, such as ``rank 3 on node7``; ``hosts`` has the host of each rank."""
    named = ", ".join(str(rank) for rank in ranks[:_NAMED])
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    where = sorted({hosts[rank] for rank in ranks})
    places = ", ".join(where[:2]) + (f" and {len(where) - 2} more hosts" if len(where) > 2 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more} on {places}"
