"""The data of a run, opened and checked against its config before any rank waits for another."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megachiar.checkpoint.compatibility import check_data
from megachiar.checkpoint.format import read_state
from megachiar.config import RunConfig
from megachiar.config.run_length import samples_of_epochs
from megachiar.data.sampling.dataset import SampleStream, SourceUse, TokenSource, ValidationSet, open_sources
from megachiar.data.sampling.history import DataHistory, OrderRecord, SourceRecord
from megachiar.data.sampling.megatron_order import MegatronStream
from megachiar.data.storage.files import bin_path
from megachiar.data.storage.manifest import TokenizerRecord, check_same_tokenizer
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.errors import UserError
from megachiar.topology import LaunchError
from megachiar.training.epochs import resolve_epochs
from megachiar.training.run_tokenizer import find_tokenizer, record_of_data
from megachiar.training.start import find_start

EPOCHS_WORTH_REPORTING = 4


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        training: its samples by position.
        validation: by name.
        history: what the run has read and reads, as checkpoints record it.
        tokenizer: None where neither config nor manifest names one.
    """

    training: SampleStream | MegatronStream
    validation: dict[str, ValidationSet]
    history: DataHistory
    tokenizer: Tokenizer | None

    @property
    def sources(self) -> list[TokenSource]:
        """Every dataset that is read from here on, to train or to validate on."""
        return [*self.training.sources, *(dataset.source for dataset in self.validation.values())]

    @property
    def tokenizer_record(self) -> TokenizerRecord | None:
        """What made the data, even where the tokenizer itself is gone; None where nothing tells."""
        return record_of_data(self.sources, self.tokenizer)

    def continue_from(self, history: DataHistory, step: int) -> RunData:
        """The data of a run that goes on at ``step`` with this data, after what ``history`` says it has read.

        Raises:
            LaunchError: a source is shorter than one sample.
        """
        if self.history.order != "keyed":
            return self
        continued = history.continue_from(self.history, step)
        sources = dict(zip(continued.numbers_of(self.history.sources), self.training.sources, strict=True))
        return replace(self, history=continued, training=_stream(continued, continued.orders[-1], sources))


def open_data(config: RunConfig) -> RunData:
    """Open every dataset of ``config``.

    Raises:
        LaunchError: one of them is missing, damaged, too short, or of another vocabulary than the model or the others.
    """
    try:
        vocab_size, length = config.model.vocab_size, config.sequence_length
        sources = open_sources([source.path for source in config.data.train], vocab_size)
        history = _initial_history(config, sources)
        training = _in_order(config, history, sources)
        validation = {
            name: ValidationSet(prefix, length, vocab_size=vocab_size)
            for name, prefix in config.data.validation.items()
        }
        data = RunData(training, validation, history, tokenizer=None)
        check_same_tokenizer([(source.prefix, source.manifest) for source in data.sources])
        return replace(data, tokenizer=find_tokenizer(config, data.sources))
    except UserError as error:  # every rank reads the same files
        raise LaunchError(error.where, error.problem, error.remedy) from error


def open_at_step(config: RunConfig, step: int) -> tuple[RunData, SampleStream | MegatronStream, range]:
    """The data of a run, its samples around step ``step``, counted from 1, and the positions that it reads.

    A run that goes on from a checkpoint has read what that one says; from there on it reads what ``config`` says.

    Raises:
        UserError: there is no such step.
        LaunchError: as ``open_data`` and ``check_data``; or a dataset that the step read is gone.
    """
    if step < 1:
        raise UserError("--step", f"{step} is no step", "steps are counted from 1, as the log counts them")
    config = resolve_epochs(config)
    data = open_data(config)
    start = find_start(config)
    if start.continues:
        state = read_state(start.path)
        check_data(start.path, state, config, data.history)
        data = data.continue_from(state.data, state.step)
    history = data.history
    positions = history.samples_of(step)
    order = history.order_at(positions.start)
    if order == history.orders[-1]:
        return data, data.training, positions
    sources = {share.source: _past_source(history, share.source) for share in order.shares}
    return data, _stream(history, order, sources), positions


def _past_source(history: DataHistory, number: int) -> TokenSource:
    record = history.sources[number]
    source = TokenSource(record.path)
    if not record.same_data(_record(source)):
        raise LaunchError(record.path, "is not the dataset any more that this step read", "bring that one back")
    return source


def _record(source: TokenSource) -> SourceRecord:
    return SourceRecord(
        path=str(source.prefix),
        tokens=source.dataset.tokens.size,
        checksum=source.manifest.content if source.manifest else None,
    )


def _initial_history(config: RunConfig, sources: list[TokenSource]) -> DataHistory:
    return DataHistory.initial(
        [(_record(source), entry.weight) for source, entry in zip(sources, config.data.train, strict=True)],
        config.sequence_length,
        config.training.global_batch_size,
        config.training.seed,
        config.sample_order,
    )


def _in_order(config: RunConfig, history: DataHistory, sources: list[TokenSource]) -> SampleStream | MegatronStream:
    """The samples of a run in the order that ``data.order`` names."""
    if config.data.order == "keyed":
        return _stream(history, history.orders[0], dict(enumerate(sources)))
    weights = [source.weight for source in config.data.train]
    samples = config.steps * config.training.global_batch_size
    return MegatronStream(sources, weights, config.sequence_length, config.training.seed, samples)


def _stream(history: DataHistory, order: OrderRecord, sources: dict[int, TokenSource]) -> SampleStream:
    """The samples of one order, out of ``sources`` by number."""
    chosen = [sources[share.source] for share in order.shares]
    try:
        return SampleStream(chosen, history.run_order(order, [bin_path(source.prefix) for source in chosen]))
    except UserError as error:
        raise LaunchError(error.where, error.problem, error.remedy) from error


def check_max_epochs(config: RunConfig, data: RunData) -> None:
    """Refuse to pass over a source more often than ``data.max_epochs``.

    Raises:
        LaunchError: names the source, its passes, and the share of its weight that would do.
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


def source_usage(config: RunConfig, data: RunData) -> list[SourceUse]:
    """What the whole run takes from each of the sources that it reads now."""
    return data.training.describe(data.history.samples_before(config.steps))


def describe_source_usage(config: RunConfig, data: RunData) -> list[str]:
    """A line for each source; what is passed over too often says so."""
    lines = []
    for use in source_usage(config, data):
        line = f"{use.prefix}: {use.tokens:,} tokens, {use.share:.1%} of samples, {use.epochs:.2f} epochs"
        if config.data.max_epochs is None and use.epochs > EPOCHS_WORTH_REPORTING:
            line += " (small for its weight: repeated text teaches ever less)"
        lines.append(line)
    return lines


def describe_seen_validation(data: RunData) -> list[str]:
    """Return a line for each validation set that is a training source as well, so that its loss is of learned text."""
    lines = []
    for name, dataset in data.validation.items():
        twins = [source.prefix for source in data.training.sources if _hold_the_same(source, dataset.source)]
        lines += [f"data.validation.{name} holds the same tokens as {twin}, which is trained on" for twin in twins]
    return lines


def _hold_the_same(one: TokenSource, other: TokenSource) -> bool:
    if one.prefix.resolve() == other.prefix.resolve():
        return True
    known = one.manifest is not None and other.manifest is not None
    return known and one.manifest.content == other.manifest.content
