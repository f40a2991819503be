"""All that the page of a run shows, as one record: curves, config, starts, events, samples and routes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import UserError
from megachiar.monitoring.happenings import moment_of
from megachiar.monitoring.page_curves import AXES, CHARTS, LAYER_CHARTS, layer_chart, series_of
from megachiar.monitoring.run_state import duration
from megachiar.monitoring.watched_run import CONFIG_FILE, WatchedRun
from megachiar.training.metrics import EVALUATION, TRAIN
from megachiar.training.samples_file import read_samples

_MOST_EVENTS = 200
_LARGEST_CONFIG = 1 << 20  # bytes


def record_of_run(run: WatchedRun, routes: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run as it was read last; ``routes`` as ``run_routes`` returns them."""
    history = run.history
    charts = [{**_described(kind), "series": series_of(history, kind)} for kind in CHARTS]
    layers = [layer_chart(name, history.layers[name]) for name in LAYER_CHARTS if name in history.layers]
    happened = run.happenings
    return {
        "run": run.name,
        "folder": str(run.folder),
        "state": {"word": run.state.word, "detail": run.state.detail},
        "written": time.time(),
        "step": run.step,
        "steps": run.steps,
        "facts": _facts(run),
        "axes": AXES,
        "charts": [chart for chart in charts if chart["series"]],
        "layers": [chart for chart in layers if chart is not None],
        "environment": _environment(run),
        "starts": [_start(event) for event in run.starts],
        "events": [
            {"time": each.time, "step": each.step, "text": each.text, "alarming": each.is_alarming}
            for each in happened[-_MOST_EVENTS:]
        ],
        "more_events": max(0, len(happened) - _MOST_EVENTS),
        "samples": _newest_samples(run.folder),
        "config": _config(run.folder),
        "routes": routes,
        "damaged": history.damaged,
    }


def _described(kind: Any) -> dict[str, Any]:
    return {"id": kind.id, "title": kind.title, "unit": kind.unit, "form": kind.form, "has_log": kind.has_log}


def _facts(run: WatchedRun) -> list[list[str]]:
    """Return the newest numbers, each with its label and a note."""
    history, steps = run.history, f"of {run.steps:,}" if run.steps is not None else ""
    found = [[f"{run.step:,}", "step", steps]]
    if (loss := history.newest_loss) is not None:
        found.append([f"{loss:.4f}", "training loss", f"step {history.step:,}"])
    for name in history.sets:
        for value, form in (("loss", ".4f"), ("bits_per_byte", ".4f"), ("accuracy", ".2%")):
            kind = f"{EVALUATION}{name}"
            if (newest := history.newest(kind, value)) is not None:
                words = value.replace("_", " ")
                found.append([format(newest, form), f"{words} on {name}", f"step {history.last[kind]['step']:,}"])
    if (rate := history.latest("tokens_per_second")) is not None:
        used = history.latest("model_flops_utilisation")
        found.append([f"{rate:,.0f}", "tokens a second", "" if used is None else f"MFU {used:.1%}"])
    if (share := run.mean_of_routed("attention_share")) is not None:
        found.append([f"{share:.1%}", "attention in routed layers", ""])
    if (tokens := history.latest("tokens")) is not None:
        found.append([f"{tokens:,.0f}", "tokens trained on", ""])
    if (elapsed := history.curve(TRAIN, "elapsed_seconds").last) is not None:
        left = run.seconds_left
        note = f"{duration(left)} left" if left and run.state.word == "running" else ""
        found.append([duration(elapsed), "of training", note])
    return found


def _environment(run: WatchedRun) -> list[list[str]]:
    """Return what the newest start ran on, as rows of words."""
    start = run.start
    if start is None:
        return []
    found = start.get("versions")
    rows = [[str(name), str(version)] for name, version in found.items()] if isinstance(found, dict) else []
    words = {
        "commit": "commit",
        "host": "host of rank 0",
        "device": "device",
        "ranks": "ranks",
        "threads": "threads of a rank",
        "layout": "layout",
        "optimizer": "optimizer",
        "parameters": "parameters",
    }
    for key, word in words.items():
        if (value := start.get(key)) is not None:
            rows.append([word, f"{value:,}" if type(value) is int else str(value)])
    return rows


def _start(event: dict[str, Any]) -> dict[str, Any]:
    changed = event.get("changed")
    keys = changed if isinstance(changed, dict) else {}
    return {
        "time": moment_of(event),
        "step": event["step"],
        "from": str(event.get("from")),
        "commit": str(event.get("commit") or ""),
        "layout": str(event.get("layout") or ""),
        "device": f"{event.get('ranks')} x {event.get('device')}",
        "changed": [[str(key), _shown(pair[0]), _shown(pair[1])] for key, pair in keys.items() if _is_pair(pair)],
    }


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _newest_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the texts that the run wrote last: step, prompt and text of each."""
    try:
        samples = read_samples(folder)
    except UserError:
        return []
    return [sample for sample in samples if sample["step"] == samples[-1]["step"]]


def _config(folder: Path) -> str:
    try:
        return read_regular(folder / CONFIG_FILE, _LARGEST_CONFIG).decode(errors="replace")
    except OSError:
        return ""
