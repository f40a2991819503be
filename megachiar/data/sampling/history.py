"""What a run has read, by source: written into each checkpoint, so that it can go on with that or with other data.

    sources   0: web/train    1: books/train    2: code/train                  each is numbered when it first comes
    orders    |-- T 2048, weights {0: 0.7, 1: 0.3} ------|-- T 8192, weights {1: 0.5, 2: 0.5} ----- ...
    batches   |-- 256 samples a step ------------------------|-- 64 ---- ...
    samples   0                                          first_sample

Where a run changes its sources, weights or sequence length a new order begins. Each source goes on where it was, in
tokens of its epoch: with the same sequence length at the very next sample, with another one at the next of its samples
that begins no earlier, so that an epoch that was begun is ended after as many tokens. (Another sequence length cuts the
source elsewhere: in that one epoch some tokens may come twice and as many not at all; each later epoch is whole.) A
source that is left out keeps its place for when it comes back; a new one begins at its beginning. A change of the batch
alone changes only which step reads a sample.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from megachiar.data.sampling.order import Consumed, OrderedSource, RunOrder


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRecord(_Record):
    """A dataset: ``path`` is where it was last read, ``checksum`` its content's, None if no manifest says it."""

    path: str
    tokens: int
    checksum: str | None

    def same_data(self, other: SourceRecord) -> bool:
        return (self.tokens, self.checksum) == (other.tokens, other.checksum)


class ShareRecord(_Record):
    """A source in an order: its number, its weight, and what had been read of it when the order began."""

    source: int
    weight: float
    epoch: int = 0
    tokens: int = 0


class OrderRecord(_Record):
    """The order of samples from ``first_sample`` of the run on."""

    first_sample: int = 0
    sequence_length: int
    shares: tuple[ShareRecord, ...]


class BatchRecord(_Record):
    """Samples of each step after the first ``first_step`` steps; these read ``first_sample`` samples."""

    first_step: int = 0
    first_sample: int = 0
    global_batch_size: int


class Change(_Record):
    """A key of the config, its value in a checkpoint and now; ``defined``: whether a run can go on all the same."""

    key: str
    before: str
    now: str
    defined: bool


class DataHistory(_Record):
    """Everything that fixes which samples a run has read and reads next.

    Attributes:
        seed: of the order.
        order: what makes it, ``RunConfig.sample_order``: only a keyed one can change on its way.
        sources: every source of the run so far, by number.
        orders, batches: by their beginnings, never empty.
    """

    seed: int
    order: str
    sources: tuple[SourceRecord, ...]
    orders: tuple[OrderRecord, ...]
    batches: tuple[BatchRecord, ...]

    @classmethod
    def initial(
        cls,
        sources: Iterable[tuple[SourceRecord, float]],
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        order: str,
    ) -> DataHistory:
        """Of a run that has read nothing yet; ``sources`` with their weights."""
        records, weights = zip(*sources, strict=True)
        shares = tuple(ShareRecord(source=number, weight=weight) for number, weight in enumerate(weights))
        return cls(
            seed=seed,
            order=order,
            sources=records,
            orders=(OrderRecord(sequence_length=sequence_length, shares=shares),),
            batches=(BatchRecord(global_batch_size=global_batch_size),),
        )

    def samples_before(self, step: int) -> int:
        """Samples that the first ``step`` steps read: the run's position after step ``step``, counted from 1."""
        batch = self.batches[bisect.bisect_right(self.batches, step, key=lambda b: b.first_step) - 1]
        return batch.first_sample + (step - batch.first_step) * batch.global_batch_size

    def samples_of(self, step: int) -> range:
        """Positions of the samples that step ``step``, counted from 1, reads."""
        return range(self.samples_before(step - 1), self.samples_before(step))

    def tokens_before(self, position: int) -> int:
        """Targets of the run's first ``position`` samples."""
        ends = [order.first_sample for order in self.orders[1:]] + [position]
        return sum(
            max(0, min(end, position) - order.first_sample) * order.sequence_length
            for order, end in zip(self.orders, ends, strict=True)
        )

    def order_at(self, position: int) -> OrderRecord:
        """The order that sample ``position`` belongs to."""
        return self.orders[bisect.bisect_right(self.orders, position, key=lambda o: o.first_sample) - 1]

    def run_order(self, order: OrderRecord, where: Sequence[object] | None = None) -> RunOrder:
        """The order that a record describes; its sources are those of ``order.shares``, in turn.

        Args:
            order: one of ``orders``.
            where: what errors call each source; its path when not given.

        Raises:
            UserError: a source is shorter than one sample, or a weight cannot be kept.
        """
        names = where or [self.sources[share.source].path for share in order.shares]
        sources = [
            OrderedSource(self.sources[s.source].tokens, s.weight, s.source, Consumed(s.epoch, s.tokens), name)
            for s, name in zip(order.shares, names, strict=True)
        ]
        return RunOrder(sources, order.sequence_length, self.seed, order.first_sample)

    def consumed(self, source: int, position: int) -> Consumed:
        """What the run's first ``position`` samples have read of a source."""
        end = position
        for order in reversed(self.orders):
            for place, share in enumerate(order.shares):
                if share.source == source and end >= order.first_sample:
                    return self.run_order(order).consumed(end)[place]
            end = min(end, order.first_sample)
        return Consumed()

    def changes(self, wanted: DataHistory, step: int) -> list[Change]:
        """What ``wanted``, an initial history, has otherwise than this run at ``step``."""
        old, new = self._until(step), wanted.orders[0]
        before, changes = old.orders[-1], []

        def note(key: str, is_same: bool, was: object, now: object, defined: bool = True) -> None:
            if not is_same:
                defined = defined and self.order == wanted.order == "keyed"
                changes.append(Change(key=key, before=str(was), now=str(now), defined=defined))

        numbers = old.numbers_of(wanted.sources)
        renumbered = [s.model_copy(update={"source": n}) for s, n in zip(new.shares, numbers, strict=True)]
        same_sources = _same_shares(before.shares, renumbered)
        note("data.train", same_sources, old._brief(before), wanted._brief(new))
        lengths = before.sequence_length, new.sequence_length
        note("data.sequence_length", lengths[0] == lengths[1], *lengths)
        sizes = old.batches[-1].global_batch_size, wanted.batches[0].global_batch_size
        note("training.global_batch_size", sizes[0] == sizes[1], *sizes)
        note("training.seed", self.seed == wanted.seed, self.seed, wanted.seed, defined=False)
        note("data.order", self.order == wanted.order, repr(self.order), repr(wanted.order), defined=False)
        return changes

    def continue_from(self, wanted: DataHistory, step: int) -> DataHistory:
        """This run's history with what ``wanted``, an initial history, asks for from ``step`` on.

        All of their ``changes`` must be defined. Where nothing changes but the paths, those are taken over.
        """
        position = self.samples_before(step)
        keys = {change.key for change in self.changes(wanted, step)}
        old = self._until(step)
        numbers = old.numbers_of(wanted.sources)
        sources = {**dict(enumerate(old.sources)), **dict(zip(numbers, wanted.sources, strict=True))}
        orders, batches = old.orders, old.batches
        if keys & {"data.train", "data.sequence_length"}:
            shares = [
                ShareRecord(source=number, weight=share.weight, **old.consumed(number, position)._asdict())
                for number, share in zip(numbers, wanted.orders[0].shares, strict=True)
            ]
            order = wanted.orders[0].model_copy(update={"first_sample": position, "shares": tuple(shares)})
            orders = (*(o for o in orders if o.first_sample < position), order)
        if "training.global_batch_size" in keys:
            batch = wanted.batches[0].model_copy(update={"first_step": step, "first_sample": position})
            batches = (*(b for b in batches if b.first_step < step), batch)
        return self.model_copy(
            update={"sources": tuple(sources[n] for n in sorted(sources)), "orders": orders, "batches": batches}
        )

    def numbers_of(self, sources: Sequence[SourceRecord]) -> list[int]:
        """The number of each of ``sources`` in this history; those that are new get the next ones.

        A dataset is known by its content, wherever it lies; of several that look the same the one at the same path.
        """
        free, numbers = dict(enumerate(self.sources)), [-1] * len(sources)
        for by_path in (True, False):
            for place, source in enumerate(sources):
                found = (n for n, s in free.items() if s.same_data(source) and (s.path == source.path or not by_path))
                number = next(found, None) if numbers[place] < 0 else None
                if number is not None:
                    numbers[place] = number
                    del free[number]
        new = iter(range(len(self.sources), len(self.sources) + len(sources)))
        return [number if number >= 0 else next(new) for number in numbers]

    def _until(self, step: int) -> DataHistory:
        """Without what would only have begun at ``step``: an order that nothing was read in leaves no trace."""
        position = self.samples_before(step)
        orders = [order for order in self.orders if order.first_sample < position] or self.orders[:1]
        batches = [batch for batch in self.batches if batch.first_step < step] or self.batches[:1]
        return self.model_copy(update={"orders": tuple(orders), "batches": tuple(batches)})

    def _brief(self, order: OrderRecord) -> str:
        sources = [(self.sources[share.source], share.weight) for share in order.shares]
        parts = [f"{s.path} ({s.tokens:,} tokens{_tail(s.checksum)}) weight {w:g}" for s, w in sources]
        return ", ".join(parts)


def _tail(checksum: str | None) -> str:
    return f", {checksum[:15]}" if checksum else ""


def _same_shares(before: Sequence[ShareRecord], now: Sequence[ShareRecord]) -> bool:
    """Whether both give each source the same share of samples, in whatever turn they name them."""

    def shares(records: Sequence[ShareRecord]) -> dict[int, float]:
        whole = sum(record.weight for record in records)
        return {record.source: record.weight / whole for record in records}

    one, other = shares(before), shares(now)
    return one.keys() == other.keys() and all(math.isclose(one[key], other[key], rel_tol=1e-9) for key in one)
