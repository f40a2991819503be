"""What a cell takes from finished cells of its seed: calibrated thresholds, or the attention share of another variant.

It is measured once, when the cell is about to begin, and recorded beside its run folder. A cell that goes on takes the
record. It is measured anew only if the request or the run that was measured has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megachiar.checkpoint.format import checkpoint_name
from megachiar.checkpoint.reading import locate_checkpoint
from megachiar.config.sweep import CalibrateConfig
from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_sealed, pretty_sealed
from megachiar.errors import UserError, disk_error
from megachiar.sweeps.cells import Cell
from megachiar.training.run_result import RunResult

SUFFIX = ".measured.json"


class Measured(BaseModel):
    """The record of what was measured for a cell.

    Attributes:
        request: what the sweep's file asks for.
        sources: config digest of each run that was measured, by variant.
        keys: keys of the config with the values that were measured.
        like_noise: places of the model at which H is distributed like that of white noise: a threshold there routes at
            random.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: dict[str, Any]
    sources: dict[str, str]
    keys: dict[str, Any]
    like_noise: list[str] = []

    def is_of(self, cell: Cell) -> bool:
        """Return whether this is what the sweep's file asks for now."""
        return self.request == _request(cell)


def read_measured(cell: Cell, sources: Mapping[str, str]) -> Measured | None:
    """Return what was measured for a cell; None if nothing was, or if it was asked for or measured otherwise.

    Args:
        cell: of a sweep.
        sources: config digest of each of its sources as the sweep has them now, by variant.

    Raises:
        UserError: the record is damaged or cannot be read.
    """
    record = read_measured_file(cell.file(SUFFIX))
    return record if record is not None and record.is_of(cell) and record.sources == dict(sources) else None


def read_measured_file(path: Path) -> Measured | None:
    """Return the record in a file; None if there is no file.

    Raises:
        UserError: the record is damaged or cannot be read.
    """
    try:
        return Measured.model_validate(parse_sealed(read_regular(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise disk_error(path, error, "read") from error
    except (ValidationError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(path, f"is damaged: {problem}", "remove it: it is then measured again") from error


def measure(cell: Cell, results: Mapping[str, RunResult]) -> Measured:
    """Measure what a cell takes from its sources, and record it.

    Args:
        cell: with sources.
        results: of each source, by variant.

    Raises:
        UserError: the checkpoint that is to be measured is gone or damaged, the data cannot be read, the source has no
            routed layer, or the disk refuses the record.
    """
    keys: dict[str, Any] = {}
    like_noise: list[str] = []
    if (request := cell.variant.calibrate) is not None:
        source = next(source for source in cell.sources if source.variant.name == request.run)
        thresholds, like_noise = _calibrate(cell, source, request, results[request.run].best.step)
        keys |= {f"model.router.{name}": value for name, value in thresholds.items()}
    if (name := cell.variant.share_of) is not None:
        share = results[name].attention_share
        if share is None:
            source = next(source for source in cell.sources if source.variant.name == name)
            remedy = f"name another variant in share_of of {cell.variant.name}"
            raise UserError(source.run, "has no attention share of routed layers", remedy)
        keys["model.router.attention_share"] = round(share, 6)
    sources = {variant: result.config_digest for variant, result in results.items()}
    record = Measured(request=_request(cell), sources=sources, keys=keys, like_noise=like_noise)
    write_atomically(cell.file(SUFFIX), pretty_sealed(record.model_dump(mode="json")))
    return record


def _request(cell: Cell) -> dict[str, Any]:
    calibrate = cell.variant.calibrate
    return {
        "calibrate": None if calibrate is None else calibrate.model_dump(mode="json"),
        "share_of": cell.variant.share_of,
        "keys": cell.measured_keys(),
    }


def _calibrate(cell: Cell, source: Cell, request: CalibrateConfig, step: int) -> tuple[dict[str, Any], list[str]]:
    """Return thresholds for the router of ``cell`` by name, and the places at which H is like noise."""
    from megachiar.analysis.calibration import calibrate_on_embedding, calibrate_on_layers, config_for
    from megachiar.inference.loaded_run import open_for_run, open_tokens_for_run
    from megachiar.inference.loading import load_model

    checkpoint = _checkpoint_of(source, step)
    config, model, _ = load_model(checkpoint)
    wanted = cell.config().model
    # H and the number of thresholds are those of the model that takes them.
    router = model.config.router.model_copy(update={"operators": wanted.router.operators})
    model.config = model.config.model_copy(update={"router": router, "dct": wanted.dct})
    data = request.data or config.data.train[0].path
    if request.where == "embedding":
        text = open_tokens_for_run(checkpoint, config, data)
        found = calibrate_on_embedding(model, text, request.tokens)
    else:
        share = 0.5 if request.attention_share is None else request.attention_share
        # The share is that of the router which takes the thresholds: a hashed one sees the channels in another order.
        taker = config_for(model.config, wanted.router.kind, wanted.router.seed)
        found = calibrate_on_layers(model, open_for_run(checkpoint, config, data), share, request.sequences, taker)
    thresholds = {name: value for name, value in found.router.items() if name.startswith("tau")}
    return thresholds, [place.name for place in found.places if place.like_noise]


def _checkpoint_of(source: Cell, step: int) -> Path:
    path = source.run / "checkpoints" / checkpoint_name(step)
    if not path.exists():
        raise UserError(
            path,
            "is gone, and another variant has to be calibrated on it",
            f"remove {source.run} and start the sweep again: it trains {source.name} anew",
        )
    return locate_checkpoint(path)
