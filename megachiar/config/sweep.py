"""``SWEEP.yaml``: variants of one config, each trained with several seeds.

    base: tiny                                  the config that all variants start from
    folder: runs/sweeps/ablation                FOLDER/VARIANT/seed_N is the run folder of a cell
    seeds: [1, 2, 3]
    variants:
      baseline:   {set: {model.kind: baseline, model.router.tau: null}}
      threshold:  {calibrate: {run: baseline}}

A cell is one variant with one seed. Its config is the base, then ``set`` of the sweep, ``set`` of the variant, a value
of each key of its ``grid``, and what is measured on the finished cell of another variant with the same seed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megachiar.config.errors import ConfigError, Problem
from megachiar.config.load import Setting
from megachiar.config.model import Share
from megachiar.config.paths import ConfigPath
from megachiar.config.section import Section
from megachiar.config.shipped import shipped_configs
from megachiar.config.typed_sections import type_section
from megachiar.config.yaml_file import read_yaml, shown_path

Scalar = bool | int | float | str | None
SEED_KEYS = ("training.seed", "model.router.seed")
"""The keys that a seed of a sweep sets: all that is drawn in a run is drawn from them. ``training.seed`` is that of
initial weights, order of samples and dropout; ``model.router.seed`` that of routers which hash."""
_SET_BY_THE_SWEEP = (*SEED_KEYS, "logging.folder")
_CALIBRATED = ("model.router.tau", "model.router.tau_low", "model.router.tau_high")
_SHARE = "model.router.attention_share"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,+=-]{0,99}")


class CalibrateConfig(Section):
    """Thresholds for the router, found by ``megachiar calibrate`` on a finished cell of the same seed."""

    run: str
    """Name of the variant whose run is measured, such as that of the baseline."""
    where: Literal["embedding", "layers"] = "embedding"
    """embedding: one threshold for all layers from the embeddings of the text's tokens, as published; a hashed router
    takes the same one. layers: one for each routed layer, from the hidden states that enter it, and for a hashed router
    from H of its permuted channels."""
    attention_share: Share | None = None
    """layers: share of tokens for attention; one half when not given."""
    data: ConfigPath | None = None
    """Prefix of the dataset whose tokens are measured; the first source of data.train when not given."""
    sequences: PositiveInt = 64
    """layers: windows of tokens that are measured, spread over the text."""
    tokens: PositiveInt = 10_000_000
    """embedding: tokens that are read, in blocks spread over the text."""


class VariantConfig(Section):
    """What makes a variant: keys of the config, and what is measured on another variant's run."""

    set: dict[str, Any] = {}
    """Values of keys of the config by dotted key."""
    grid: dict[str, Annotated[tuple[Scalar, ...], Field(strict=False, min_length=1)]] = {}
    """Values of keys, of which each combination is a variant of its own, named VARIANT-KEY=VALUE by the key's last
    name."""
    calibrate: CalibrateConfig | None = None
    """Sets model.router.tau, or tau_low and tau_high with three operators."""
    share_of: str | None = None
    """Name of the variant whose attention share, that of the routed layers of the finished cell of the same seed,
    becomes model.router.attention_share: a control at equal share."""


class SweepConfig(Section):
    """All keys of a sweep's file."""

    base: Annotated[str, Field(min_length=1)]
    """The config of a run: a file, by its path from the folder of this one, or a shipped config by its name."""
    folder: ConfigPath
    """Folder of the sweep: the run folder of a cell is FOLDER/VARIANT/seed_N."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
    """Seeds that each variant is trained with. A seed becomes training.seed and model.router.seed: initial weights,
    order of samples, dropout, and routers that hash."""
    set: dict[str, Any] = {}
    """Values of keys of the config, for all variants, by dotted key."""
    variants: Annotated[dict[str, VariantConfig], Field(min_length=1)]
    """The variants by name."""
    reference: str | None = None
    """Name of the variant that the others are compared with, seed by seed; the first one when not given."""
    measures: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The measures that the table shows, by dotted name in results.json, such as test.test.loss or
    validation.valid.best.loss. When not given, the loss on each test set, or without one on each validation set."""
    launch: str = ""
    """Words that start the ranks of a run, such as deepspeed --num_gpus 8; nothing starts one process."""
    slurm: str = ""
    """Options for sbatch with --slurm, such as --nodes=1 --gres=gpu:1 --time=4:00:00."""
    remove_checkpoints: bool = False
    """Remove the checkpoints of a cell that is finished, once no other cell has to be measured on them."""


@dataclass(frozen=True)
class Variant:
    """A variant, one for each combination of a grid.

    Attributes:
        name: as tables and folders have it.
        settings: the keys that it sets, those of the sweep first.
        calibrate: how its thresholds are found; None where they are set.
        share_of: name of the variant whose attention share it takes; None for none.
    """

    name: str
    settings: tuple[Setting, ...]
    calibrate: CalibrateConfig | None
    share_of: str | None

    @property
    def sources(self) -> list[str]:
        """The variants whose cell of the same seed must be finished first."""
        calibrated = [self.calibrate.run] if self.calibrate is not None else []
        return [*calibrated, *([self.share_of] if self.share_of is not None else [])]


@dataclass(frozen=True)
class Sweep:
    """A sweep that was read and checked.

    Attributes:
        path: its file.
        config: the content.
        base: file of the base.
        variants: by name, in the order of the file.
        order: their names so that each comes after those that it is measured on.
    """

    path: Path
    config: SweepConfig
    base: Path
    variants: dict[str, Variant]
    order: tuple[str, ...]

    @property
    def reference(self) -> str:
        """Name of the variant that the others are compared with."""
        return self.config.reference or next(iter(self.variants))


def load_sweep(path: Path) -> Sweep:
    """Read and check the sweep at ``path``; the configs of its cells are checked where they are made.

    Raises:
        UserError: the file cannot be read as a YAML mapping.
        ConfigError: names all problems of its content together.
    """
    mapping, lines = read_yaml(path)
    shown = shown_path(path)

    def fail(problems: list[Problem]) -> ConfigError:
        places = [_line(shown, lines, tuple(problem.key.split("."))) for problem in problems]
        return ConfigError(shown, list(zip(places, problems, strict=True)))

    config, problems = type_section(SweepConfig, mapping, (), {})
    if config is None or problems:
        raise fail(problems)
    variants = {variant.name: variant for variant in _expand(config, shown, lines)}
    problems = [*_problems_of_names(config, variants), *_problems_of_sources(config, variants)]
    base = _find_base(path, config.base)
    if base is None:
        known = ", ".join(shipped_configs())
        problems.append(Problem("base", f"{config.base} is neither a file nor a shipped config ({known})", "name one"))
    if config.reference is not None and config.reference not in variants:
        problems.append(_no_variant("reference", config.reference, variants))
    if problems:
        raise fail(problems)
    assert base is not None
    order = _in_order(variants)
    if order is None:
        raise fail([Problem("variants", "are measured on one another in a circle", "break it at one variant")])
    return Sweep(path, config, base, variants, order)


def _line(shown: str, lines: dict[tuple[str, ...], int], parts: tuple[str, ...]) -> str:
    """Return ``file:line`` of a key, or of the longest part of its path that has a line."""
    found = next((lines[parts[:size]] for size in range(len(parts), 0, -1) if parts[:size] in lines), None)
    return f"{shown}:{found}" if found is not None else shown


def _find_base(path: Path, name: str) -> Path | None:
    file = path.parent / Path(name).expanduser()
    if file.is_file():
        return file
    return shipped_configs().get(name.removesuffix(".yaml"))


def _problems_of_names(config: SweepConfig, variants: dict[str, Variant]) -> Iterator[Problem]:
    for name in variants:
        if not _NAME.fullmatch(name):
            yield Problem(f"variants.{name}", "is no name of a folder", "use letters, digits and _ . , + = -")
    if len(variants) < sum(1 for _ in _expand(config, "", {})):
        yield Problem("variants", "have a name twice, one of them made by a grid", "rename one")
    if len(set(config.seeds)) < len(config.seeds):
        yield Problem("seeds", f"{list(config.seeds)} has a seed twice", "list each once")
    places = {"set": list(config.set)}
    for name, variant in config.variants.items():
        places |= {f"variants.{name}.set": list(variant.set), f"variants.{name}.grid": list(variant.grid)}
    for place, keys in places.items():
        for key in keys:
            if any(key == own or own.startswith(f"{key}.") for own in _SET_BY_THE_SWEEP):
                yield Problem(f"{place}.{key}", "is set by the sweep itself, from seeds and folder", "remove it")


def _expand(config: SweepConfig, shown: str, lines: dict[tuple[str, ...], int]) -> Iterator[Variant]:
    """Yield the variants, one for each combination of a grid."""
    common = [Setting(key, value, _line(shown, lines, ("set", key))) for key, value in config.set.items()]
    for name, variant in config.variants.items():
        at = ("variants", name)
        own = [Setting(key, value, _line(shown, lines, (*at, "set", key))) for key, value in variant.set.items()]
        for values in itertools.product(*variant.grid.values()):
            chosen = list(zip(variant.grid, values, strict=True))
            points = [Setting(key, value, _line(shown, lines, (*at, "grid", key))) for key, value in chosen]
            full_name = "-".join([name, *(f"{key.rpartition('.')[2]}={value}" for key, value in chosen)])
            yield Variant(full_name, (*common, *own, *points), variant.calibrate, variant.share_of)


def _problems_of_sources(config: SweepConfig, variants: dict[str, Variant]) -> Iterator[Problem]:
    for name, variant in config.variants.items():
        at = f"variants.{name}"
        if variant.calibrate is not None:
            if variant.calibrate.run not in variants:
                yield _no_variant(f"{at}.calibrate.run", variant.calibrate.run, variants)
            if variant.calibrate.where == "embedding" and variant.calibrate.attention_share is not None:
                yield Problem(
                    f"{at}.calibrate.attention_share",
                    "has no effect with where: embedding",
                    "set where to layers, or remove it",
                )
        if variant.share_of is not None and variant.share_of not in variants:
            yield _no_variant(f"{at}.share_of", variant.share_of, variants)
        yield from _problems_of_measured(at, variant)


def _problems_of_measured(at: str, variant: VariantConfig) -> Iterator[Problem]:
    """Yield each value of a key that is measured for the variant: a cell would not be what its name says."""
    measured = [("calibrate", key) for key in _CALIBRATED if variant.calibrate is not None]
    measured += [("share_of", _SHARE)] if variant.share_of is not None else []
    for by, key in measured:
        places = [name for name in ("set", "grid") if getattr(variant, name).get(key) is not None]
        for place in places:
            yield Problem(f"{at}.{place}.{key}", f"is measured, by {by}, which replaces it", "remove one of the two")


def _no_variant(key: str, name: str, variants: dict[str, Variant]) -> Problem:
    return Problem(key, f"{name} is no variant of this sweep", f"name one of {', '.join(variants)}")


def _in_order(variants: dict[str, Variant]) -> tuple[str, ...] | None:
    """Return the names so that each comes after its sources; None if they go in a circle."""
    order: list[str] = []
    while len(order) < len(variants):
        left = (name for name in variants if name not in order)
        ready = next((name for name in left if set(variants[name].sources) <= set(order)), None)
        if ready is None:
            return None
        order.append(ready)
    return tuple(order)
