"""Give runs names that tell them apart, as short as their paths allow.

a/run, b/run               a/run, b/run
runs/tiny, runs/400m       tiny, 400m
x/threshold/seed_1         threshold/seed_1, a run of the variant threshold
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_SEED = re.compile(r"seed_\d+")


class RunName(NamedTuple):
    """How a report calls a run.

    Attributes:
        label: of the run alone.
        variant: what it has in common with runs that differ from it in their seed; the label of a run without such.
    """

    label: str
    variant: str


def name_runs(folders: Sequence[Path]) -> list[RunName]:
    """Return a name for each of different folders, in their order. Folders ``seed_N`` are runs of the folder above."""
    places = [folder.resolve() for folder in folders]
    units = {place.parent if _SEED.fullmatch(place.name) else place for place in places}
    short = _shortest_names(units)
    names = []
    for place in places:
        if _SEED.fullmatch(place.name):
            variant = short[place.parent]
            names.append(RunName(f"{variant}/{place.name}", variant))
        else:
            names.append(RunName(short[place], short[place]))
    return names


def _shortest_names(places: set[Path]) -> dict[Path, str]:
    """Return, for each path, as many of its last parts as tell it from the others."""
    length = dict.fromkeys(places, 1)
    while True:
        names = {place: "/".join(place.parts[-count:]) for place, count in length.items()}
        uses = Counter(names.values())
        same = [place for place, name in names.items() if uses[name] > 1 and length[place] < len(place.parts)]
        if not same:
            return names
        for place in same:
            length[place] += 1
