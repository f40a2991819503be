"""What a report has from the models themselves: continuations of prompts, and routes of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megachiar.analysis.text_routes import TextRoutes
from megachiar.checkpoint.format import checkpoint_name
from megachiar.errors import UserError
from megachiar.reporting.notes import Notes
from megachiar.reporting.reported_run import ReportedRun
from megachiar.reporting.table import Column, Table, text
from megachiar.viewer.open_run import OpenRun, open_run

PROMPTS = (
    "The captain who had brought the ship through three winters of ice was asked, long after, what she had feared "
    "most. She said",
    "A sorting algorithm compares two neighbours and swaps them when the first is",
    "It was late in the evening, and the snow had covered the road to the village, when the old man",
    "If the smaller of 4 and 9 is called X, then X plus 3 is",
)
"""Prompts of four kinds: something to remember over a distance, a technical text, a story, and a calculation."""
TEXT = "Although the old bridge had carried the road for a hundred years, the town decided that a new one was needed."
"""The text whose routes are shown."""


@dataclass(frozen=True)
class LookSettings:
    """How models are looked at.

    Attributes:
        prompts: texts to continue.
        text: whose routes are shown.
        max_new_tokens: largest number of tokens of a continuation.
        temperature: of the sampling; 0 takes the likeliest token.
        seed: of the random draws.
    """

    prompts: Sequence[str] = PROMPTS
    text: str = TEXT
    max_new_tokens: int = 25
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Looks:
    """What was seen of the models.

    Attributes:
        continuations: by the label of the run, one for each prompt.
        routes: by the label of the run.
        steps: of the checkpoint that was opened, by the label of the run.
    """

    continuations: dict[str, list[str]] = field(default_factory=dict)
    routes: dict[str, TextRoutes] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)


def look_at_models(
    runs: Sequence[ReportedRun], settings: LookSettings, notes: Notes, log: Callable[[str], None]
) -> Looks:
    """Open the model of each run that may be opened, and continue the prompts and route the text with it.

    Args:
        runs: of the report.
        settings: how.
        notes: take what cannot be done and why.
        log: is told of each run that is opened.
    """
    looks = Looks()
    for run in runs:
        if not run.opens_model or run.folder is None:
            continue
        if run.classifies:
            notes.add(run.label, "learns classes: it continues no text, and has no heatmap")
            continue
        log(f"{run.label}: continuations and routes")
        try:
            opened = _open(run, notes)
        except UserError as error:
            notes.add(f"{run.label}, continuations and heatmap", error)
            continue
        _look(run, opened, settings, looks, notes)
    return looks


def _open(run: ReportedRun, notes: Notes) -> OpenRun:
    """Open the checkpoint that the run was tested with, or the newest one."""
    assert run.folder is not None
    step = None if run.result is None else run.result.best.step
    if step is not None and not (run.folder / "checkpoints" / checkpoint_name(step)).exists():
        if run.state is not None:
            notes.add(run.label, f"the tested checkpoint of step {step:,} is gone: the newest one continues texts")
        step = None
    return open_run(run.folder, step, log=lambda line: notes.add(run.label, line))


def _look(run: ReportedRun, opened: OpenRun, settings: LookSettings, looks: Looks, notes: Notes) -> None:
    looks.steps[run.label] = opened.state.step
    try:
        looks.continuations[run.label] = [continuation(opened, prompt, settings) for prompt in settings.prompts]
    except UserError as error:
        notes.add(f"{run.label}, continuations", error)
    if not opened.config.model.routed_layers:
        notes.add(f"{run.label}, heatmap", "no layer of this model routes")
        return
    try:
        looks.routes[run.label] = opened.routes(opened.encode(settings.text, "--text"))
    except UserError as error:
        notes.add(f"{run.label}, heatmap", error)


def continuation(opened: OpenRun, prompt: str, settings: LookSettings) -> str:
    """Return what a run makes of a prompt, without the prompt.

    Raises:
        UserError: the prompt is empty and no token ends a document, or it is no Unicode.
    """
    sampler = opened.sampler
    start = list(sampler.start(opened.encode(prompt, "--prompt") if prompt else []))
    drawn = sampler.stream(start, settings.max_new_tokens, temperature=settings.temperature, seed=settings.seed)
    decode = sampler.tokenizer.decode
    return decode([*start, *drawn]).removeprefix(decode(start))


def continuations_table(looks: Looks, settings: LookSettings) -> Table:
    """Return the prompts with what each run makes of them, a row for each prompt."""
    labels = list(looks.continuations)
    rows: list[Mapping[str, Any]] = [
        {"prompt": prompt, **{label: looks.continuations[label][number] for label in labels}}
        for number, prompt in enumerate(settings.prompts)
    ]
    columns = [text("prompt", "prompt"), *(_continued(label) for label in labels)]
    how = "the likeliest token each" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    if settings.temperature:
        how += f", seed {settings.seed}"
    note = f"At most {settings.max_new_tokens} new tokens, {how}. (nothing): no text came, or white space alone."
    return Table("continuations", "Continuations of prompts", ("prompt", *labels), rows, columns, note)


def _continued(label: str) -> Column:
    return Column(label, lambda row: row[label] if row[label].strip() else "(nothing)", is_text=True)


def routes_table(label: str, name: str, routes: TextRoutes) -> Table:
    """Return operator and spectral entropy of each token in each layer, a row for each of both; for CSV alone."""
    trace, rows = routes.trace, []
    for place, found in enumerate(routes.texts):
        for layer in range(len(trace.routed)):
            operator, entropy = int(trace.operator[layer, 0, place]), float(trace.entropy[layer, 0, place])
            shown = None if entropy != entropy else entropy
            taken = trace.operators[operator]
            rows.append(
                {
                    "position": place,
                    "token": found.control or found.text,
                    "layer": layer + 1,
                    "routed": trace.routed[layer],
                    "operator": taken,
                    "entropy": shown,
                }
            )
    keys = ("position", "token", "layer", "routed", "operator", "entropy")
    return Table(name, f"Routes of {label}", keys, rows, ())
