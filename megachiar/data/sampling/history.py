"""Record how far a run has read each source, so that a checkpoint can be continued with the same or with other data.

    sources   0: web/train    1: books/train    2: code/train                  numbered in order of first use
    orders    |-- T 2048, weights {0: 0.7, 1: 0.3} ------|-- T 8192, weights {1: 0.5, 2: 0.5} ----- ...
    batches   |-- 256 samples a step ------------------------|-- 64 ---- ...
    samples   0                                          first_sample

Where a run changes its sources, weights or sequence length, a new order begins. Each source continues where it was, in
tokens of its epoch. With the same sequence length that is the very next sample. With another one it is the first of its
new samples that begins no earlier. So an epoch ends after as many tokens as without the change. Another sequence length
cuts the source elsewhere. In that one epoch some tokens may be read twice and as many not at all; each later epoch is
whole. A source that is left out keeps its position for when it is used again; a new one begins at its first sample. A
change of the batch size alone changes only which step reads a sample. Where a run has rolled back from
bad samples, its order leaves them out, and the samples after them move up. A later order of the same source and
sequence length leaves the same samples out, as far as they lie ahead.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from pydantic import Field, model_validator

from megachiar.data.sampling.history_records import (
    BatchRecord,
    Change,
    LeftOutRecord,
    OrderRecord,
    Record,
    ShareRecord,
    SourceRecord,
)
from megachiar.data.sampling.left_out import IntArray, LeftOut, as_ranges, numbers_in
from megachiar.data.sampling.order import Consumed, OrderedSource, RunOrder, StreamOrder

_SourceSamples = dict[tuple[int, int], IntArray]
"""Numbers of samples, int64 (n,), by source and sequence length: with the same of both, all orders number alike."""


class DataHistory(Record):
    """Record everything that decides which samples a run has read and reads next.

    Attributes:
        seed: the seed of the order.
        order: the kind of order, ``RunConfig.sample_order``; only a keyed one can change during a run.
        sources: every source of the run so far, by number.
        orders, batches: the orders and batch sizes of the run so far, by their beginnings, never empty.
        left_out: samples ahead that a rollback has left out and that belong to none of ``orders``: of a source that was
            taken out before the run read a sample of it in that order.
    """

    seed: int
    order: str
    sources: tuple[SourceRecord, ...]
    orders: tuple[OrderRecord, ...] = Field(min_length=1)
    batches: tuple[BatchRecord, ...] = Field(min_length=1)
    left_out: tuple[LeftOutRecord, ...] = ()

    @model_validator(mode="after")
    def _check_order(self) -> DataHistory:
        for name, firsts in (
            ("orders", [order.first_sample for order in self.orders]),
            ("batches", [batch.first_step for batch in self.batches]),
        ):
            if firsts[0] != 0 or sorted(set(firsts)) != firsts:
                raise ValueError(f"{name} do not begin at 0 and one after another: they begin at {firsts}")
        named = [share.source for order in self.orders for share in order.shares]
        for number in (*named, *(record.source for record in self.left_out)):
            if number >= len(self.sources):
                raise ValueError(f"source {number} of {len(self.sources)} is named")
        for before, batch in pairwise(self.batches):
            samples = before.first_sample + (batch.first_step - before.first_step) * before.global_batch_size
            if batch.first_sample != samples:
                raise ValueError(f"step {batch.first_step} begins at sample {batch.first_sample}, not at {samples}")
        return self

    @classmethod
    def initial(
        cls,
        sources: Iterable[tuple[SourceRecord, float]],
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        order: str,
    ) -> DataHistory:
        """Return the history of a run that has read nothing yet; ``sources`` are given with their weights."""
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
        """Return how many samples the first ``step`` steps read, which is the run's position after step ``step``."""
        batch = self.batches[bisect.bisect_right(self.batches, step, key=lambda b: b.first_step) - 1]
        return batch.first_sample + (step - batch.first_step) * batch.global_batch_size

    def samples_of(self, step: int) -> range:
        """Return the positions of the samples that step ``step``, counted from 1, reads."""
        return range(self.samples_before(step - 1), self.samples_before(step))

    def tokens_before(self, position: int) -> int:
        """Return the number of targets of the run's first ``position`` samples."""
        ends = [order.first_sample for order in self.orders[1:]] + [position]
        return sum(
            max(0, min(end, position) - order.first_sample) * order.sequence_length
            for order, end in zip(self.orders, ends, strict=True)
        )

    def order_at(self, position: int) -> OrderRecord:
        """Return the order that sample ``position`` belongs to."""
        return self.orders[bisect.bisect_right(self.orders, position, key=lambda o: o.first_sample) - 1]

    def order_of(self, step: int) -> OrderRecord:
        """Return the order that the samples of step ``step``, counted from 1, belong to."""
        return self.order_at(self.samples_before(step - 1))

    def run_order(self, order: OrderRecord, where: Sequence[object] | None = None) -> RunOrder:
        """Build the order that a record describes; its sources are those of ``order.shares``, in this order.

        Args:
            order: one of ``orders``.
            where: the name of each source in errors; its path when not given.

        Raises:
            UserError: a source is shorter than one sample, or a weight cannot be kept.
        """
        names = where or [self.sources[share.source].path for share in order.shares]
        sources = [
            OrderedSource(self.sources[s.source].units, s.weight, s.source, Consumed(s.epoch, s.tokens), name)
            for s, name in zip(order.shares, names, strict=True)
        ]
        return RunOrder(sources, order.sequence_length, self.seed, order.first_sample, order.left_out)

    def leave_out(self, positions: range) -> DataHistory:
        """Return the history of a run that never reads the samples that are now at ``positions``.

        The samples after them move up. ``positions`` must belong to the newest order.
        """
        order = self.orders[-1]
        assert positions.start >= order.first_sample, "a past order cannot change"
        return self._leave_out_places(LeftOut(order.left_out).places(np.arange(positions.start, positions.stop)))

    def _leave_out_places(self, places: IntArray) -> DataHistory:
        """Return the history whose newest order leaves out ``places`` too."""
        order = self.orders[-1]
        every = np.concatenate([numbers_in(order.left_out), places])
        changed = order.model_copy(update={"left_out": as_ranges(every)})
        return self.model_copy(update={"orders": (*self.orders[:-1], changed)})

    def consumed(self, source: int, position: int) -> Consumed:
        """Return how far the run's first ``position`` samples have read a source."""
        end = position
        for order in reversed(self.orders):
            for index, share in enumerate(order.shares):
                if share.source == source and end >= order.first_sample:
                    return self.run_order(order).consumed(end)[index]
            end = min(end, order.first_sample)
        return Consumed()

    def changes(self, requested: DataHistory, step: int) -> list[Change]:
        """List the differences between ``requested``, an initial history, and this run at ``step``."""
        old, new = self.until(step), requested.orders[0]
        before, changes = old.orders[-1], []

        def note(key: str, is_same: bool, was: object, now: object, defined: bool = True) -> None:
            if not is_same:
                defined = defined and self.order == requested.order == "keyed"
                changes.append(Change(key=key, before=str(was), now=str(now), defined=defined))

        numbers = old.numbers_of(requested.sources)
        renumbered = [s.model_copy(update={"source": n}) for s, n in zip(new.shares, numbers, strict=True)]
        same_sources = _same_shares(before.shares, renumbered)
        note("data.train", same_sources, old._brief(before), requested._brief(new))
        lengths = before.sequence_length, new.sequence_length
        note("data.sequence_length", lengths[0] == lengths[1], *lengths)
        sizes = old.batches[-1].global_batch_size, requested.batches[0].global_batch_size
        note("training.global_batch_size", sizes[0] == sizes[1], *sizes)
        note("training.seed", self.seed == requested.seed, self.seed, requested.seed, defined=False)
        note("data.order", self.order == requested.order, repr(self.order), repr(requested.order), defined=False)
        return changes

    def continue_from(self, requested: DataHistory, step: int) -> DataHistory:
        """Return this run's history, continued from ``step`` on as ``requested``, an initial history, describes.

        All of their ``changes`` must be defined. Where only the paths differ, the new paths are taken over. Samples
        that were left out stay left out, but for those that ``describe_returning`` tells.
        """
        position = self.samples_before(step)
        keys = {change.key for change in self.changes(requested, step)}
        old = self.until(step)
        numbers = old.numbers_of(requested.sources)
        sources = {**dict(enumerate(old.sources)), **dict(zip(numbers, requested.sources, strict=True))}
        orders, batches = old.orders, old.batches
        if keys & {"data.train", "data.sequence_length"}:
            shares = [
                ShareRecord(source=number, weight=share.weight, **old.consumed(number, position)._asdict())
                for number, share in zip(numbers, requested.orders[0].shares, strict=True)
            ]
            order = requested.orders[0].model_copy(update={"first_sample": position, "shares": tuple(shares)})
            orders = (*(o for o in orders if o.first_sample < position), order)
        if "training.global_batch_size" in keys:
            batch = requested.batches[0].model_copy(update={"first_step": step, "first_sample": position})
            batches = (*(b for b in batches if b.first_step < step), batch)
        continued = self.model_copy(
            update={"sources": tuple(sources[n] for n in sorted(sources)), "orders": orders, "batches": batches}
        )
        ahead = self._left_out_ahead(step)
        return continued._leave_out_samples(ahead)._keep(ahead, position)

    def describe_returning(self, requested: DataHistory, step: int) -> list[str]:
        """Return a line for the log for each source of which the run, continued, may read left out samples again.

        Args:
            requested: see ``continue_from``.
            step: from which the run is continued.
        """
        ahead = self._left_out_ahead(step)
        order = self.continue_from(requested, step).orders[-1] if ahead else self.orders[-1]
        now = {share.source for share in order.shares}
        unknown = any(number >= len(self.sources) for number in now)
        lines = []
        for source, length in sorted({*self.until(step)._newest_lengths(), *self._newest_lengths()} & ahead.keys()):
            count = len(ahead[source, length])
            samples = f"{count:,} sample{'' if count == 1 else 's'}"
            what = f"{samples} of {self.sources[source].path} that a rollback left out"
            if source in now and length != order.sequence_length:
                lines.append(f"{what} may be read again, since another data.sequence_length cuts samples elsewhere")
            elif source not in now and unknown:
                lines.append(f"{what} may be read again, if new data holds the same text")
        return lines

    def _newest_lengths(self) -> set[tuple[int, int]]:
        """Return each source with the sequence length of its last order."""
        unread = {record.source: record.sequence_length for record in self.left_out}
        read = {share.source: order.sequence_length for order in self.orders for share in order.shares}
        return {*(unread | read).items()}

    def _left_out_ahead(self, step: int) -> _SourceSamples:
        """Return the samples that are left out and that the run has not passed after ``step``."""
        position, read, ahead = self.samples_before(step), self.until(step), {}
        for (source, length), numbers in self._left_out_from(position).items():
            series = StreamOrder(self.sources[source].units, length, (self.seed, source))
            ahead[source, length] = numbers[numbers >= series.first_after(read.consumed(source, position))]
        return {key: numbers for key, numbers in ahead.items() if numbers.size}

    def _left_out_from(self, position: int) -> _SourceSamples:
        """Return the samples that ``left_out`` names, or any order from ``position`` or its end on."""
        found: dict[tuple[int, int], list[IntArray]] = {}
        ends = [order.first_sample for order in self.orders[1:]] + [position]
        for order, end in zip(self.orders, ends, strict=True):
            if order.left_out:
                samples = self.run_order(order).left_out_samples(min(end, position))
                for share, of_source in zip(order.shares, samples, strict=True):
                    found.setdefault((share.source, order.sequence_length), []).append(of_source)
        for record in self.left_out:
            found.setdefault((record.source, record.sequence_length), []).append(numbers_in(record.samples))
        return {key: np.unique(np.concatenate(parts)) for key, parts in found.items()}

    def _leave_out_samples(self, samples: _SourceSamples) -> DataHistory:
        """Return the history whose newest order leaves out ``samples`` of its sources too, where it has them."""
        order = self.orders[-1]
        keys = [(share.source, order.sequence_length) for share in order.shares]
        if samples.keys().isdisjoint(keys):
            return self
        run_order = self.run_order(order)
        places = [run_order.places(index, samples[key]) for index, key in enumerate(keys) if key in samples]
        return self._leave_out_places(np.concatenate(places))

    def _keep(self, samples: _SourceSamples, position: int) -> DataHistory:
        """Return the history with those of ``samples`` in ``left_out`` that no order leaves out from there on."""
        known = self.model_copy(update={"left_out": ()})._left_out_from(position)
        rest = {key: np.setdiff1d(numbers, known.get(key, ())) for key, numbers in samples.items()}
        records = [
            LeftOutRecord(source=source, sequence_length=length, samples=as_ranges(numbers))
            for (source, length), numbers in sorted(rest.items())
            if numbers.size
        ]
        return self.model_copy(update={"left_out": tuple(records)})

    def numbers_of(self, sources: Sequence[SourceRecord]) -> list[int]:
        """Return the number of each of ``sources`` in this history; new ones get the next numbers.

        A dataset is recognised by its content, wherever it is stored. Of several with the same content, the one at the
        same path is taken first.
        """
        free, numbers = dict(enumerate(self.sources)), [-1] * len(sources)
        for by_path in (True, False):
            for index, source in enumerate(sources):
                found = (n for n, s in free.items() if s.same_data(source) and (s.path == source.path or not by_path))
                number = next(found, None) if numbers[index] < 0 else None
                if number is not None:
                    numbers[index] = number
                    del free[number]
        new = iter(range(len(self.sources), len(self.sources) + len(sources)))
        return [number if number >= 0 else next(new) for number in numbers]

    def until(self, step: int) -> DataHistory:
        """Return the history without orders and batch sizes that begin at ``step`` or later, as nothing used them."""
        position = self.samples_before(step)
        orders = [order for order in self.orders if order.first_sample < position] or self.orders[:1]
        batches = [batch for batch in self.batches if batch.first_step < step] or self.batches[:1]
        return self.model_copy(update={"orders": tuple(orders), "batches": tuple(batches)})

    def _brief(self, order: OrderRecord) -> str:
        """Describe the sources of an order in a line."""
        sources = [(self.sources[share.source], share.weight) for share in order.shares]
        parts = [f"{s.path} ({s.tokens:,} tokens{_tail(s)}) weight {w:g}" for s, w in sources]
        return ", ".join(parts)


def _tail(source: SourceRecord) -> str:
    content = source.checksum[:15] if source.checksum else source.sampled
    return f", {content}" if content else ""


def _same_shares(before: Sequence[ShareRecord], now: Sequence[ShareRecord]) -> bool:
    """Return whether both give each source the same share of samples, in whatever order they name them."""

    def shares(records: Sequence[ShareRecord]) -> dict[int, float]:
        whole = sum(record.weight for record in records)
        return {record.source: record.weight / whole for record in records}

    one, other = shares(before), shares(now)
    return one.keys() == other.keys() and all(math.isclose(one[key], other[key], rel_tol=1e-9) for key in one)
