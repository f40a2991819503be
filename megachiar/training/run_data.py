"""Open the data of a run and check it against the config, before any rank waits for another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megachiar.checkpoint.compatibility import check_data
from megachiar.checkpoint.format import read_state
from megachiar.config import RunConfig
from megachiar.config.run_length import asked_length, samples_of_epochs
from megachiar.config.tasks import MAIN_TASK
from megachiar.data.sampling.dataset import SampleStream, TokenSource, ValidationSet, open_sources
from megachiar.data.sampling.examples import (
    SAMPLE_LENGTH,
    ExampleSet,
    ExampleStream,
    LabelledSource,
    open_example_set,
    open_labelled_sources,
)
from megachiar.data.sampling.history import DataHistory
from megachiar.data.sampling.history_records import OrderRecord, SourceRecord
from megachiar.data.sampling.megatron_order import MegatronStream
from megachiar.data.storage.files import bin_path
from megachiar.data.storage.manifest import TokenizerRecord, check_same_tokenizer
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.errors import UserError
from megachiar.topology import LaunchError
from megachiar.training.auxiliary_data import NOTHING_READ, AuxiliaryTask, TasksRead, open_auxiliary_tasks
from megachiar.training.epochs import resolve_epochs
from megachiar.training.run_tokenizer import find_tokenizer, record_of_data
from megachiar.training.start import find_start


@dataclass(frozen=True)
class RunData:
    """The datasets of a run.

    Attributes:
        training: training samples by position in the run.
        validation: validation sets by name, those of auxiliary tasks too.
        test: test sets by name, which are read after the last step alone.
        history: what the run has read and reads next, as checkpoints record it.
        tokenizer: of the datasets; None where neither config nor manifest names one that is still there.
        auxiliary: the other tasks of mixed training, in the order of the config.
        tasks_read: how far these had read their data where the run started or went on.
    """

    training: SampleStream | MegatronStream
    validation: dict[str, ValidationSet | ExampleSet]
    test: dict[str, ValidationSet | ExampleSet]
    history: DataHistory
    tokenizer: Tokenizer | None
    auxiliary: tuple[AuxiliaryTask, ...] = ()
    tasks_read: TasksRead = NOTHING_READ

    @property
    def sources(self) -> list[TokenSource]:
        """Every dataset that the run reads from here on, for training, validation or the test."""
        held_out = (*self.validation.values(), *self.test.values())
        return [
            *self.training.sources,
            *(dataset.source for dataset in held_out),
            *(task.source for task in self.auxiliary),
        ]

    def classes(self) -> dict[str, tuple[str, ...] | None]:
        """Return the names of the classes of each classification, in their order, by the name of its head."""
        sources = {MAIN_TASK: self.training.sources[0]} | {task.name: task.source for task in self.auxiliary}
        return {name: record_of(source).classes for name, source in sources.items()}

    def validation_records(self) -> dict[str, SourceRecord]:
        """Return what each validation set holds, by name, and the data of each auxiliary task, by the task's key."""
        sets = {name: record_of(dataset.source) for name, dataset in self.validation.items()}
        return sets | {f"mixed.tasks.{task.name}": record_of(task.source) for task in self.auxiliary}

    def test_records(self) -> dict[str, SourceRecord]:
        """Return what each test set holds, by name."""
        return {name: record_of(dataset.source) for name, dataset in self.test.items()}

    @property
    def tokenizer_record(self) -> TokenizerRecord | None:
        """The record of the tokenizer that made the data, even if its files are gone; None where nothing records it."""
        return record_of_data(self.sources, self.tokenizer)

    def continue_from(self, history: DataHistory, step: int, after_rollback: DataHistory | None = None) -> RunData:
        """Return the data of a run that has read ``history`` up to ``step`` and continues with this data.

        Args:
            history: that the checkpoint of ``step`` records.
            step: optimizer steps taken.
            after_rollback: ``history`` without samples that a rollback to this checkpoint has left out; None if there
                was none.

        Raises:
            LaunchError: a source is shorter than one sample.
        """
        if self.history.order != "keyed":
            return self
        return self.with_history((after_rollback or history).continue_from(self.history, step))

    def leave_out(self, positions: range) -> RunData:
        """Return the data of a run that never reads the samples that are now at ``positions``; its order is keyed."""
        return self.with_history(self.history.leave_out(positions))

    def with_history(self, history: DataHistory) -> RunData:
        """Return the data of a run with ``history``, whose newest order has the sources of this data."""
        if history.order != "keyed":
            return replace(self, history=history)
        training = _stream(history, history.orders[-1], self._sources_by_number(history), self.training.sequence_length)
        return replace(self, history=history, training=training)

    def samples_in(self, order: OrderRecord) -> SampleStream | MegatronStream:
        """Return the samples in one order of the history.

        The sources of a past order are those of this data that have the same content, or else what is still at the
        paths where the run has read them.

        Raises:
            UserError: a dataset that the run has read is gone, or is another one now.
        """
        if order == self.history.orders[-1]:
            return self.training
        sources = self._sources_by_number(self.history)
        for share in order.shares:
            if share.source not in sources:
                sources[share.source] = self._past_source(self.history.sources[share.source])
        return _stream(self.history, order, sources, self.training.sequence_length)

    def _past_source(self, record: SourceRecord) -> TokenSource:
        classes = len(self.training.labelled[0].classes) if isinstance(self.training, ExampleStream) else None
        source = open_recorded(record.path, record, classes)
        if not record.same_data(record_of(source)):
            raise _gone(record.path)
        return source

    def _sources_by_number(self, history: DataHistory) -> dict[int, TokenSource]:
        records = [record_of(source) for source in self.training.sources]
        return dict(zip(history.numbers_of(records), self.training.sources, strict=True))


def open_data(config: RunConfig) -> RunData:
    """Open every dataset of ``config``.

    Raises:
        LaunchError: a dataset is missing, damaged or too short, or its vocabulary does not fit the model's or the
            other datasets'.
    """
    try:
        vocab_size, length = config.model.vocab_size, config.sequence_length
        train, head = config.data.train, config.tasks[0].head
        paths, fractions = [source.path for source in train], [source.fraction for source in train]
        sources: list[TokenSource] = []
        open_set: Callable[[Path], ValidationSet | ExampleSet]
        if head is None:
            sources += open_sources(paths, vocab_size, fractions)
            open_set = lambda prefix: ValidationSet(prefix, length, vocab_size=vocab_size)  # noqa: E731
        else:
            labelled = open_labelled_sources(paths, head.classes, vocab_size, fractions)
            sources += labelled
            open_set = lambda prefix: open_example_set(prefix, labelled[0], length, vocab_size, task=0)  # noqa: E731
        validation, test = (
            {name: open_set(prefix) for name, prefix in sets.items()}
            for sets in (config.data.validation, config.data.test)
        )
        history = _initial_history(config, sources)
        training = _in_order(config, history, sources)
        auxiliary = open_auxiliary_tasks(config)
        validation |= {task.name: task.validation for task in auxiliary if task.validation is not None}
        test |= {task.name: task.test for task in auxiliary if task.test is not None}
        data = RunData(training, validation, test, history, tokenizer=None, auxiliary=auxiliary)
        check_same_tokenizer([(source.prefix, source.manifest) for source in data.sources if _has_tokenizer(source)])
        return replace(data, tokenizer=find_tokenizer(config, data.sources))
    except UserError as error:  # every rank reads the same files, so that one report is enough
        raise LaunchError(error.where, error.problem, error.remedy) from error


def open_at_step(config: RunConfig, step: int) -> tuple[RunData, SampleStream | MegatronStream, range]:
    """Open what one step of a run reads or has read.

    Up to its newest checkpoint a run has read what the checkpoint records; from there on it reads what ``config`` says.

    Args:
        config: of the run.
        step: counted from 1.

    Returns:
        The data of the run, the samples in the order that the step belongs to, and the positions that the step reads.

    Raises:
        UserError: ``step`` is below 1 or beyond the last step of the run.
        LaunchError: as ``open_data`` and ``check_data``; or a dataset that the step has read is gone.
    """
    if step < 1:
        raise UserError("--step", f"{step} is no step", "steps are counted from 1, as the log counts them")
    config = resolve_epochs(config)
    data = open_data(config)
    start = find_start(config)
    if (last := max(config.steps, start.step)) < step:
        key, _ = asked_length(config.training)
        raise UserError(
            f"--step {step}",
            f"the run ends with step {last:,}",
            f"give a step from 1 to {last}, or let the run be longer with training.{key}",
        )
    if (checkpoint := start.continues_from) is not None:
        state = read_state(checkpoint)
        check_data(checkpoint, state, config, data.history, start.is_own)
        data = data.continue_from(state.data, state.step, start.history_after_rollback)
    return data, data.samples_in(data.history.order_of(step)), data.history.samples_of(step)


def open_recorded(path: Path | str, record: SourceRecord, classes: int | None = None) -> TokenSource:
    """Open the dataset at ``path`` as far as the dataset of ``record`` was read.

    Of a record that has nothing but the number of tokens, that of the whole dataset must be the same.

    Args:
        path: of the dataset, without ``.bin``.
        record: of a dataset.
        classes: how many a labelled dataset has; None for one without labels.

    Raises:
        UserError: there is none, or it is damaged.
    """
    is_known = record.checksum is not None or record.sampled is not None
    if classes is not None:
        return LabelledSource(path, classes, limit=record.examples if is_known else None)
    return TokenSource(path, limit=record.tokens if is_known else None)


def _gone(path: str) -> LaunchError:
    problem = "is no longer the dataset that this step has read"
    return LaunchError(path, problem, "put that dataset back; where it has moved, name its new path in data.train")


def _has_tokenizer(source: TokenSource) -> bool:
    """Return whether the ids of a dataset are a tokenizer's, not the ready-made ids of a labelled dataset."""
    made = source.manifest
    return not isinstance(source, LabelledSource) or (made is not None and made.tokenizer.kind != "ids")


def record_of(source: TokenSource) -> SourceRecord:
    """Return what a history records of a dataset."""
    return SourceRecord(
        path=str(source.prefix),
        tokens=source.tokens.size,
        examples=source.examples if isinstance(source, LabelledSource) else None,
        classes=tuple(source.classes) if isinstance(source, LabelledSource) else None,
        checksum=source.manifest.content if source.manifest else None,
        sampled=None if source.manifest else source.sampled_digest(),
    )


def _initial_history(config: RunConfig, sources: list[TokenSource]) -> DataHistory:
    return DataHistory.initial(
        [(record_of(source), entry.weight) for source, entry in zip(sources, config.data.train, strict=True)],
        config.sequence_length if config.tasks[0].head is None else SAMPLE_LENGTH,
        config.training.global_batch_size,
        config.training.seed,
        config.sample_order,
    )


def _in_order(config: RunConfig, history: DataHistory, sources: list[TokenSource]) -> SampleStream | MegatronStream:
    """Return the samples of a new run in the order that ``data.order`` names."""
    if config.data.order == "keyed":
        return _stream(history, history.orders[0], dict(enumerate(sources)), config.sequence_length)
    weights = [source.weight for source in config.data.train]
    samples = config.steps * config.training.global_batch_size
    return MegatronStream(sources, weights, config.sequence_length, config.training.seed, samples)


def _stream(
    history: DataHistory, order: OrderRecord, sources: dict[int, TokenSource], sequence_length: int
) -> SampleStream:
    """Return the samples of one order, read from ``sources``, which are keyed by their number in ``history``.

    ``sequence_length`` is that of labelled examples; a language model's is that of its order.
    """
    for share in order.shares:
        if share.source not in sources:
            raise _gone(history.sources[share.source].path)
    ordered = [sources[share.source] for share in order.shares]
    try:
        run_order = history.run_order(order, [bin_path(source.prefix) for source in ordered])
        labelled = [source for source in ordered if isinstance(source, LabelledSource)]
        return ExampleStream(labelled, run_order, sequence_length) if labelled else SampleStream(ordered, run_order)
    except UserError as error:
        raise LaunchError(error.where, error.problem, error.remedy) from error


def check_max_epochs(config: RunConfig, data: RunData) -> None:
    """Check that the run reads no source more often than ``data.max_epochs`` times.

    Raises:
        LaunchError: a source is too small. The message names it, its epochs, and the share of its weight that it can
            have.
    """
    limit, samples = config.data.max_epochs, data.history.samples_before(config.steps)
    if config.training.epochs is not None:  # the rest of the last step is not what was asked for
        samples_per_epoch = sum(use.samples_per_epoch for use in data.training.describe(samples))
        samples = min(samples, samples_of_epochs(config.training.epochs, samples_per_epoch))
    for use in data.training.describe(samples):
        if limit is not None and use.epochs > limit:
            raise LaunchError(
                f"data.train {use.prefix}",
                f"{use.tokens:,} tokens at {use.share:.1%} of the samples are passed over {use.epochs:.2f} times, more "
                f"than data.max_epochs {limit:g}",
                f"give it at most {limit / use.epochs:.3f} of its share, add text, or train for fewer steps",
            )
