"""Read labelled datasets: the examples of a classification, in a keyed order for training or one after another.

The order of examples is that of a stream whose samples are one token long (``order.py``), where token k stands for
example k: an epoch reads each example once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachiar.data.sampling.dataset import SampleStream, SourceUse, TokenSource, part_of, refuse_duplicates
from megachiar.data.sampling.order import RunOrder
from megachiar.data.storage.files import bin_path
from megachiar.data.storage.labels import read_labels
from megachiar.data.storage.manifest import check_same_tokenizer
from megachiar.data.storage.reader import IndexedDataset
from megachiar.errors import UserError
from megachiar.kernels.ignored_target import PADDING

SAMPLE_LENGTH = 1
"""The sequence length of the order that examples come in."""


class LabelledSource(TokenSource):
    """Open a labelled dataset and check it, its labels included.

    Attributes:
        classes: the names of the classes.
        labels: the number of each example's class, int32 (examples,).
        examples: how many are read.
        longest: the most tokens that an example has.

    Args:
        prefix: the path of the dataset without ``.bin``.
        classes: how many classes the model tells apart.
        vocab_size: the rows of the model's embedding; None leaves ids unchecked.
        limit: how many of its examples are read, from the first on; None reads all.
        random_access: whether it will be read in random order, see ``IndexedDataset``.

    Raises:
        UserError: the dataset is damaged or has no labels, another number of classes than ``classes``, or an example
            without a token.
    """

    def __init__(
        self,
        prefix: Path | str,
        classes: int,
        vocab_size: int | None = None,
        *,
        limit: int | None = None,
        random_access: bool = False,
    ):
        super().__init__(prefix, vocab_size, random_access=random_access)
        labels = read_labels(prefix, self.manifest, self.dataset.documents)
        self.classes, self.labels = labels.classes, labels.numbers[:limit]
        self.examples = len(self.labels)
        if len(self.classes) != classes:
            raise UserError(
                bin_path(prefix),
                f"has {len(self.classes)} classes, but the config says {classes}",
                f"set the key `classes` to {len(self.classes)}, or preprocess with `--classes-from` the training set",
            )
        starts = np.append(self.dataset.pointers // self.dataset.dtype.itemsize, self.dataset.tokens.size)
        self._starts = starts[self.dataset.document_starts][: self.examples + 1]
        self.tokens = self.dataset.tokens[: self._starts[-1]]
        lengths = np.diff(self._starts)
        if not self.examples or not lengths.min():
            what = f"document {int(np.argmin(lengths)):,} has no tokens" if self.examples else "has no examples"
            raise UserError(bin_path(prefix), what, "leave empty examples out")
        self.longest = int(lengths.max())

    @property
    def units(self) -> int:
        """What an order of its samples counts: the examples that are read, and one more for the last one's target."""
        return self.examples + SAMPLE_LENGTH

    def describe_cut(self, sequence_length: int, key: str) -> str | None:
        """Return in words how much of the examples ``sequence_length`` tokens leave out; None where all are whole.

        Args:
            sequence_length: the first tokens of an example that a model reads.
            key: the setting that gives this number.
        """
        lengths = np.diff(self._starts)
        cut = lengths[lengths > sequence_length]
        if not cut.size:
            return None
        share = 1 - sequence_length * cut.size / int(cut.sum())
        return (
            f"{cut.size:,} of {self.examples:,} examples are longer than {key} {sequence_length:,} and lose "
            f"{share:.1%} of their tokens, on which the class may depend: the longest has {self.longest:,} tokens"
        )

    def read_example(self, number: int, out: NDArray[Any]) -> None:
        """Fill ``out``, int64 (T + 1,), with the first T tokens of an example, padding, and its label.

        Raises:
            UserError: an id is not in the model's vocabulary.
        """
        start, stop = int(self._starts[number]), int(self._starts[number + 1])
        length = min(stop - start, len(out) - 1)
        out[length:-1] = PADDING
        out[-1] = self.labels[number]
        self.read(start, out[:length])


class ExampleStream(SampleStream):
    """Read a run's endless series of training examples: example k is a pure function of sources, order and k.

    Args:
        sources: the datasets, as ``order`` numbers them.
        order: of examples: its sequence length is ``SAMPLE_LENGTH``.
        sequence_length: T, tokens of a sample.
    """

    def __init__(self, sources: Sequence[LabelledSource], order: RunOrder, sequence_length: int):
        super().__init__(sources, order)
        self.labelled, self.sequence_length = tuple(sources), sequence_length

    def batch(self, positions: Iterable[int]) -> NDArray[Any]:
        """Return the samples of the run at ``positions``, int64 (n, T + 1): tokens, padding of -1, and the label."""
        locations = self.locate(positions)
        batch = np.empty((len(locations), self.sequence_length + 1), np.int64)
        for row, location in zip(batch, locations, strict=True):
            self.labelled[location.source].read_example(location.token, row)
        return batch

    def documents(self, position: int) -> list[int]:
        """Return the number of the example at ``position``, in a list."""
        (location,) = self.locate([position])
        return [location.token]

    def describe(self, samples: int) -> list[SourceUse]:
        """Describe the part of each source in the samples of the run up to ``samples``."""
        return [
            use._replace(
                tokens=source.tokens.size,
                epochs=begin.epoch + begin.tokens / source.examples,
            )
            for use, source, begin in zip(
                super().describe(samples), self.labelled, self.order.consumed(samples), strict=True
            )
        ]


class ExampleSet:
    """Read a labelled dataset once, in order.

    Attributes:
        source: the dataset.
        prefix: the path of the dataset.
        task: number of the run's task that it is for.
        windows: the number of examples.

    Args:
        source: the dataset.
        sequence_length: T, tokens of a sample.
        task: number of the run's task that it is for.
    """

    def __init__(self, source: LabelledSource, sequence_length: int, task: int):
        self.source, self.prefix, self.task = source, source.prefix, task
        self.sequence_length, self.windows = sequence_length, source.examples

    def batch(self, first: int, last: int) -> NDArray[Any]:
        """Read examples ``first`` to ``last - 1``, int64 (last - first, T + 1): tokens, padding, and the label."""
        if not 0 <= first <= last <= self.windows:
            raise IndexError(f"examples {first} to {last} of {self.windows} in {self.prefix}")
        batch = np.empty((last - first, self.sequence_length + 1), np.int64)
        for row, number in zip(batch, range(first, last), strict=True):
            self.source.read_example(number, row)
        return batch


def open_labelled_sources(
    prefixes: Sequence[Path | str], classes: int, vocab_size: int | None = None, fractions: Sequence[float] = ()
) -> list[LabelledSource]:
    """Open and check every source of a classification run.

    Args:
        prefixes: the paths of the datasets without ``.bin``.
        classes: how many classes the model tells apart.
        vocab_size: the rows of the model's embedding; None leaves ids unchecked.
        fractions: of the examples of each source that are read, from the first on; all where it is empty.

    Raises:
        UserError: a source is damaged, has no labels or others than the first, is listed twice, was made with another
            tokenizer than the first, or has too large a vocabulary.
    """
    refuse_duplicates(prefixes)
    opened = [
        LabelledSource(prefix, classes, vocab_size, limit=_examples_read(prefix, share), random_access=True)
        for prefix, share in zip(prefixes, fractions or [1.0] * len(prefixes), strict=True)
    ]
    check_same_tokenizer([(source.prefix, source.manifest) for source in opened])
    check_same_classes(opened)
    return opened


def _examples_read(prefix: Path | str, fraction: float) -> int | None:
    return None if fraction == 1 else part_of(IndexedDataset(prefix).documents, fraction)


def open_example_set(
    prefix: Path, trained_on: LabelledSource, sequence_length: int, vocab_size: int | None, task: int
) -> ExampleSet:
    """Open a labelled dataset to be measured on, with the classes of the one that the task trains on.

    Raises:
        UserError: it is damaged, or has other classes.
    """
    source = LabelledSource(prefix, len(trained_on.classes), vocab_size)
    check_same_classes([trained_on, source])
    return ExampleSet(source, sequence_length, task)


def check_same_classes(sources: Sequence[LabelledSource]) -> None:
    """Check that a class has the same number in all datasets of a task.

    Raises:
        UserError: two datasets name other classes, or in another order.
    """
    for source in sources[1:]:
        if source.classes != sources[0].classes:
            raise UserError(
                bin_path(source.prefix),
                f"has the classes {', '.join(source.classes)}, but {sources[0].prefix} has "
                f"{', '.join(sources[0].classes)}",
                f"preprocess it with `--classes-from {sources[0].prefix}`",
            )
