"""The cells of a sweep, one for each variant and seed: where they lie on disk, and the config of each.

FOLDER/VARIANT/seed_1/                 run folder
FOLDER/VARIANT/seed_1.yaml             config of the run, whole
FOLDER/VARIANT/seed_1.measured.json    what was measured on other variants' runs for it (measured.py)
FOLDER/VARIANT/seed_1.log              what its runs printed
FOLDER/VARIANT/seed_1.failed.json      exit code of its last run, if that failed
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megachiar.config import RunConfig
from megachiar.config.bases import read_with_bases
from megachiar.config.load import Setting, load_with_settings
from megachiar.config.sweep import SEED_KEYS, Sweep, Variant
from megachiar.errors import UserError

_TO_BE_MEASURED = 0.5
"""What stands in a config for a threshold or share that is not measured yet, so that the rest can be checked."""


@dataclass(frozen=True)
class Cell:
    """One variant with one seed.

    Attributes:
        sweep: that it belongs to.
        variant: of the sweep.
        seed: of the sweep.
    """

    sweep: Sweep
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Its name in messages and on the disk."""
        return f"{self.variant.name}/seed_{self.seed}"

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.sweep.config.folder / self.variant.name / f"seed_{self.seed}"

    def file(self, suffix: str) -> Path:
        """Return its file beside the run folder that ends in ``suffix``, such as ``.log``."""
        return self.run.with_name(self.run.name + suffix)

    @property
    def sources(self) -> list[Cell]:
        """The cells that must be finished before this one can begin."""
        return [Cell(self.sweep, self.sweep.variants[name], self.seed) for name in self.variant.sources]

    def config(self, measured: Mapping[str, Any] | None = None) -> RunConfig:
        """Return the config of its run.

        Args:
            measured: keys that were measured on other runs, with their values. Without it a value that is still to be
                measured is one half.

        Raises:
            UserError, ConfigError: the base cannot be read, or the config has problems.
        """
        if measured is None:
            measured = dict.fromkeys(self.measured_keys(), _TO_BE_MEASURED)
        own = [
            *((key, self.seed) for key in SEED_KEYS),
            ("logging.folder", str(self.run)),
            *measured.items(),
        ]
        where = f"{self.name}, set by the sweep"
        settings = [*self.variant.settings, *(Setting(key, value, where) for key, value in own)]
        return load_with_settings(self.sweep.base, settings, f"{self.sweep.path}, {self.name}")

    def measured_keys(self) -> list[str]:
        """Return the keys of the config that are measured on other runs."""
        keys = []
        if self.variant.calibrate is not None:
            names = ("tau_low", "tau_high") if len(self._operators()) == 3 else ("tau",)
            keys += [f"model.router.{name}" for name in names]
        if self.variant.share_of is not None:
            keys.append("model.router.attention_share")
        return keys

    def _operators(self) -> list[Any]:
        """Return ``model.router.operators`` of its config, which says how many thresholds there are."""
        mapping, _ = read_with_bases(self.sweep.base)
        router = mapping.get("model", {}).get("router", {})
        found = router.get("operators", ("dct", "attention"))
        for setting in self.variant.settings:
            if setting.key == "model.router.operators":
                found = setting.value
            elif setting.key == "model.router" and isinstance(setting.value, dict):
                found = setting.value.get("operators", ("dct", "attention"))
        return list(found)


def cells_of(sweep: Sweep, only: Collection[str] = ()) -> list[Cell]:
    """Return the cells of a sweep in the order in which they run: seed by seed, sources first.

    Args:
        sweep: that was read.
        only: names of variants; empty for all of them.

    Raises:
        UserError: a name of ``only`` is no variant.
    """
    for name in only:
        if name not in sweep.variants:
            raise UserError(
                "--only", f"{name} is no variant of {sweep.path}", f"name some of {', '.join(sweep.variants)}"
            )
    wanted = [sweep.variants[name] for name in sweep.order if not only or name in only]
    return [Cell(sweep, variant, seed) for seed in sweep.config.seeds for variant in wanted]


def cell_named(sweep: Sweep, name: str) -> Cell:
    """Return the cell that is called ``VARIANT/seed_N``.

    Raises:
        UserError: there is none of this name.
    """
    found = next((cell for cell in cells_of(sweep) if cell.name == name), None)
    if found is None:
        example = next(iter(cells_of(sweep))).name
        raise UserError("--cell", f"{name} is no cell of {sweep.path}", f"give one such as {example}")
    return found


def levels_of(cells: Collection[Cell]) -> Iterator[list[Cell]]:
    """Yield the cells in groups: those of a group wait for cells of earlier groups alone."""
    left, names = list(cells), {cell.name for cell in cells}
    done: set[str] = set()
    while left:
        level = [cell for cell in left if all(s.name in done or s.name not in names for s in cell.sources)]
        yield level
        done |= {cell.name for cell in level}
        left = [cell for cell in left if cell.name not in done]
