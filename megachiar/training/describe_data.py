"""Say at the start of a run what it takes from its datasets, and what of them may surprise.

Each function returns lines for the log, which a dry run prints too.
"""

from __future__ import annotations

from typing import Literal

from megachiar.config import RunConfig
from megachiar.data.sampling.dataset import SourceUse, TokenSource
from megachiar.data.sampling.examples import LabelledSource
from megachiar.data.storage.files import bin_path
from megachiar.training.document_ends import describe_document_ends
from megachiar.training.run_data import RunData

EPOCHS_WORTH_REPORTING = 4


def describe_data(config: RunConfig, data: RunData) -> list[str]:
    """Return what the log says of the data: how often each source is read, and what may surprise."""
    surprises = [
        *describe_repeated_sources(data),
        *describe_cut_examples(config, data),
        *describe_document_ends(data),
        *describe_seen_sets(data),
    ]
    return [*describe_source_usage(config, data), *surprises]


def source_usage(config: RunConfig, data: RunData) -> list[SourceUse]:
    """Return what the whole run, to its last step, takes from each of its current sources."""
    return data.training.describe(data.history.samples_before(config.steps))


def describe_source_usage(config: RunConfig, data: RunData) -> list[str]:
    """Return a line for the log for each source; it warns of a source that the run repeats too often."""
    lines = []
    for use in source_usage(config, data):
        line = f"{use.prefix}: {use.tokens:,} tokens, {use.share:.1%} of samples, {use.epochs:.2f} epochs"
        is_text = config.tasks[0].head is None
        if is_text and config.data.max_epochs is None and use.epochs > EPOCHS_WORTH_REPORTING:
            line += " (small for its weight: repeated text teaches ever less)"
        lines.append(line)
    return lines


def describe_cut_examples(config: RunConfig, data: RunData) -> list[str]:
    """Return a line for the log for each labelled dataset with examples that ``data.sequence_length`` cuts."""
    trained = [(f"data.train {source.prefix}", source) for source in data.training.sources]
    trained += [(f"mixed.tasks.{task.name}.data", task.source) for task in data.auxiliary]
    named = [*trained, *_held_out(data, "validation").items(), *_held_out(data, "test").items()]
    cuts = [
        (key, source.describe_cut(config.sequence_length, "data.sequence_length"))
        for key, source in named
        if isinstance(source, LabelledSource)
    ]
    return [f"{key}: {said}" for key, said in cuts if said is not None]


def describe_seen_sets(data: RunData) -> list[str]:
    """Return a line for the log for each set that measures nothing new: it is also trained on, or chosen by."""
    validation, test = _held_out(data, "validation"), _held_out(data, "test")
    trained = [*data.training.sources, *(task.source for task in data.auxiliary)]
    lines = []
    for key, source in {**validation, **test}.items():
        twins = [other.prefix for other in trained if _hold_the_same(other, source)]
        lines += [f"{key} holds the same tokens as {twin}, which is trained on" for twin in twins]
    for key, source in test.items():
        sets = [other for other, known in validation.items() if _hold_the_same(known, source)]
        lines += [f"{key} holds the same tokens as {twin}: the run is chosen by what tests it" for twin in sets]
    return lines


def describe_repeated_sources(data: RunData) -> list[str]:
    """Return a line for the log for each training source that holds the same tokens as one before it."""
    lines, sources = [], data.training.sources
    for number, source in enumerate(sources):
        twin = next((earlier for earlier in sources[:number] if _hold_the_same(source, earlier)), None)
        if twin is not None:
            lines.append(
                f"data.train: {source.prefix} holds the same tokens as {twin.prefix}, so that they count double: list "
                "them once, with the sum of the weights, if that is not what you want"
            )
    return lines


def _hold_the_same(one: TokenSource, other: TokenSource) -> bool:
    """Return whether two datasets are one file under two names, or copies by what their manifests record."""
    if bin_path(one.prefix).samefile(bin_path(other.prefix)):
        return True
    if one.manifest is None or other.manifest is None:
        return False
    return one.manifest.content == other.manifest.content


def _held_out(data: RunData, kind: Literal["validation", "test"]) -> dict[str, TokenSource]:
    """Return the dataset of each validation or test set of a run, by the key of the config that names it."""
    sets = data.validation if kind == "validation" else data.test
    of_tasks = [task.name for task in data.auxiliary if getattr(task, kind) is not None]
    return {
        f"mixed.tasks.{name}.{kind}" if name in of_tasks else f"data.{kind}.{name}": dataset.source
        for name, dataset in sets.items()
    }
