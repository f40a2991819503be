"""The records that a history of the data is made of: sources, orders, batch sizes, and changes between them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

_TOO_MANY = 1 << 53  # samples, tokens or steps, so that their products with small numbers fit 64 bits
_TOO_MANY_LEFT_OUT = 1 << 26  # samples, so that their numbers fit the memory
_TOO_MANY_EPOCHS = 1 << 32
Ranges = tuple[tuple[int, int], ...]
"""First number and end of each range, ascending and apart."""


class Record(BaseModel):
    """Refuse unknown keys and changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRecord(Record):
    """Identify a dataset.

    Attributes:
        path: where it was last read.
        tokens: how many are read of it.
        examples: how many examples are read of a labelled dataset; None of one without labels.
        classes: names of the classes of a labelled dataset, in their order; None of one without labels, and in records
            of earlier versions.
        checksum: ``Manifest.content``; None without a manifest.
        sampled: digests of a few blocks of its files, where there is no manifest; None in records of earlier versions.
    """

    path: str
    tokens: int
    checksum: str | None
    sampled: str | None = None
    examples: int | None = None
    classes: tuple[str, ...] | None = None

    @property
    def units(self) -> int:
        """What an order counts, see ``TokenSource.units``: tokens, or one more than the examples."""
        return self.tokens if self.examples is None else self.examples + 1

    def same_data(self, other: SourceRecord) -> bool:
        """Return whether both have the same content, wherever it is stored."""
        unknown = self.sampled is None or other.sampled is None
        if None not in (self.classes, other.classes) and self.classes != other.classes:
            return False
        return (self.tokens, self.checksum, self.examples) == (other.tokens, other.checksum, other.examples) and (
            unknown or self.sampled == other.sampled
        )


class ShareRecord(Record):
    """Describe a source in an order.

    Attributes:
        source: its number in the history.
        weight: its weight beside the other sources of the order.
        epoch, tokens: how far it had been read when the order began, see ``Consumed``.
    """

    source: int = Field(ge=0, lt=_TOO_MANY)
    weight: float = Field(gt=0, allow_inf_nan=False)
    epoch: int = Field(default=0, ge=0, lt=_TOO_MANY_EPOCHS)
    tokens: int = Field(default=0, ge=0, lt=_TOO_MANY)


class OrderRecord(Record):
    """Describe the order of samples from ``first_sample`` of the run on.

    Attributes:
        first_sample: the position of the run that the order begins at.
        sequence_length: the tokens of a sample.
        shares: the sources.
        left_out: first place and end of each range of the order that a rollback has left out, see ``LeftOut``.
    """

    first_sample: int = Field(default=0, ge=0, lt=_TOO_MANY)
    sequence_length: int = Field(ge=1, lt=_TOO_MANY)
    shares: tuple[ShareRecord, ...] = Field(min_length=1)
    left_out: Ranges = ()

    @field_validator("left_out")
    @classmethod
    def _check_left_out(cls, ranges: Ranges) -> Ranges:
        return _check_ranges(ranges)


class LeftOutRecord(Record):
    """Name samples of a source that the run leaves out as soon as it has an order with them again.

    Attributes:
        source: its number in the history.
        sequence_length: the tokens of a sample.
        samples: first number and end of each range of the source's samples of the run.
    """

    source: int = Field(ge=0, lt=_TOO_MANY)
    sequence_length: int = Field(ge=1, lt=_TOO_MANY)
    samples: Ranges

    @field_validator("samples")
    @classmethod
    def _check_samples(cls, ranges: Ranges) -> Ranges:
        return _check_ranges(ranges)


class BatchRecord(Record):
    """Give the samples of each step after step ``first_step``; the steps up to it read ``first_sample`` samples."""

    first_step: int = Field(default=0, ge=0, lt=_TOO_MANY)
    first_sample: int = Field(default=0, ge=0, lt=_TOO_MANY)
    global_batch_size: int = Field(ge=1, lt=_TOO_MANY)


class Change(Record):
    """Name a key of the config whose value differs between a checkpoint and now.

    Attributes:
        key: the key.
        before, now: its values, for a message.
        defined: whether a run can be continued with the new value.
    """

    key: str
    before: str
    now: str
    defined: bool


def _check_ranges(ranges: Ranges) -> Ranges:
    numbers = [number for both in ranges for number in both]
    if sorted(set(numbers)) != numbers or any(not 0 <= number < _TOO_MANY for number in numbers):
        raise ValueError(f"has ranges that are empty, overlap or are not in order: {ranges}")
    if (count := sum(end - first for first, end in ranges)) > _TOO_MANY_LEFT_OUT:
        raise ValueError(f"has {count} samples, more than {_TOO_MANY_LEFT_OUT}")
    return ranges
