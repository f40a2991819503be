"""The cache of incremental decoding: what a model keeps of the positions of a sequence that it has read.

    SequenceCache    one sequence: its length, running sums, and a KeyValueBuffer for each operator that looks back
    DecodingCache    the sequences of one pass, each with a length of its own

A sequence owns its buffers. It joins and leaves passes without a copy, and its neighbours change nothing for it. A
buffer has room for entries to come: a token is written in place, and the buffer grows by an eighth at a time. Where
keys belong to routed tokens alone, the other tokens have no entry, and their memory is never taken.

Shapes: B = sequences of a pass, S = tokens of a sequence in it, n = routed rows among the B * S, T = entries of a
buffer, h = heads, c = channels of a head, d = channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megachiar.kernels.attention import causal_attention, routed_attention
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.routed_rows import RoutedRows

LEAST_ROOM = 16
"""Entries that a buffer has room for, at least, when it is made or made larger."""
ROOM = 8
"""It has room for one more entry in so many that it holds."""


class KeyValueBuffer:
    """Keys and values of one operator in one sequence.

    Attributes:
        count: T, the entries that it holds.
    """

    def __init__(self) -> None:
        self.count = 0
        self._numbers: torch.Tensor | None = None  # (2, 1, h, capacity, c)

    def append(self, entries: torch.Tensor) -> None:
        """Add keys and values (2, 1, h, new, c); or (1, 1, h, new, c), where the keys are the values too."""
        end = self.count + entries.shape[3]
        if self._numbers is None or end > self._numbers.shape[3]:
            self._numbers = self._larger(entries, end)
        self._numbers.narrow(3, self.count, entries.shape[3]).copy_(entries)
        self.count = end

    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (1, h, T, c), at least one of them, as views."""
        assert self._numbers is not None, "a buffer is read after something was written"
        parts = self._numbers.narrow(3, 0, self.count).unbind()
        return parts[0], parts[-1]

    @property
    def num_bytes(self) -> int:
        """The bytes that it takes, its room included."""
        return 0 if self._numbers is None else self._numbers.nbytes

    def _larger(self, like: torch.Tensor, count: int) -> torch.Tensor:
        """Return a buffer with what this one holds, and room for ``count`` entries like ``like`` and some more."""
        kinds, one, heads, _, channels = like.shape
        numbers = like.new_empty(kinds, one, heads, count + max(LEAST_ROOM, count // ROOM), channels)
        if self._numbers is not None:
            numbers.narrow(3, 0, self.count).copy_(self._numbers.narrow(3, 0, self.count))
        return numbers


class SequenceCache:
    """What is kept of one sequence. All its positions are of one document.

    Attributes:
        length: positions that were read.
        prefix: () int64, hash of the document so far, where random routes are drawn by it; else None.
        total: (d,) fp32 or fp64, sum of the hidden states before layer 1, for the mean of the MetaRouter; else None.
        buffers: keys and values by the name of the operator (``layers.INDEX.OPERATOR``).
    """

    def __init__(self) -> None:
        self.length = 0
        self.prefix: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.buffers: dict[str, KeyValueBuffer] = {}

    @property
    def num_bytes(self) -> int:
        """The bytes of all that is kept."""
        sums = sum(part.nbytes for part in (self.prefix, self.total) if part is not None)
        return sums + sum(buffer.num_bytes for buffer in self.buffers.values())


class LayerCache:
    """The buffers of one operator for the sequences of a pass."""

    def __init__(self, buffers: Sequence[KeyValueBuffer]):
        self._buffers = buffers

    def append(self, entries: torch.Tensor) -> None:
        """Add keys and values (B, S, 2, h, c) of all rows; or (B, S, 1, h, c), where the keys are the values too."""
        of_sequences = entries.permute(0, 2, 3, 1, 4).unsqueeze(2).unbind()  # (2, 1, h, S, c)
        for buffer, of_sequence in zip(self._buffers, of_sequences, strict=True):
            buffer.append(of_sequence)

    def append_routed(self, entries: torch.Tensor, rows: RoutedRows) -> None:
        """Add keys and values (n, 2, h, c) of the routed rows alone."""
        parts = entries.permute(1, 2, 0, 3).unsqueeze(1).split(rows.counts(), 3)  # (2, 1, h, new, c)
        for buffer, part in zip(self._buffers, parts, strict=True):
            if part.shape[3]:
                buffer.append(part)

    def attend(
        self, q: torch.Tensor, rows: RoutedRows, *, keys_are_routed: bool = False, scale: float | None = None
    ) -> torch.Tensor:
        """Compute attention of the routed rows of this pass to the entries of their sequence up to their own.

        Args:
            q: queries (n, h, c) of the routed rows, in their order.
            rows: which of the B * S rows they are.
            keys_are_routed: whether the entries are those of routed rows alone.
            scale: factor of the products of queries and keys; 1 / sqrt(c) if None.

        Returns:
            (n, h, c).
        """
        options, counts, mixed = AttentionOptions(scale=scale), rows.counts(), []
        parts = q.transpose(0, 1)[None].split(counts, 2)  # (1, h, queries of the sequence, c)
        for number, (buffer, queries) in enumerate(zip(self._buffers, parts, strict=True)):
            if counts[number] == 0:
                continue
            keys, values = buffer.entries()
            if keys_are_routed or counts[number] == rows.length:  # the entries of these queries are the newest ones
                of_sequence = causal_attention(queries, keys, values, options)[0].transpose(0, 1)
            else:
                queries = queries[0].transpose(0, 1)
                of_sequence = routed_attention(queries, keys, values, rows.of_sequence(number, counts), options)
            mixed.append(of_sequence)
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed) if mixed else q


class DecodingCache:
    """The caches of the sequences of one pass, in the order of its rows.

    Attributes:
        sequences: B caches.
    """

    def __init__(self, sequences: Iterable[SequenceCache]) -> None:
        self.sequences = list(sequences)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many positions of each sequence were read before this pass, or with it once the pass is over."""
        return tuple(sequence.length for sequence in self.sequences)

    def layer(self, name: str) -> LayerCache:
        """Return the buffers of the operator with this name; they are empty at first."""
        return LayerCache([sequence.buffers.setdefault(name, KeyValueBuffer()) for sequence in self.sequences])

    def advance(self, length: int) -> None:
        """Count ``length`` more positions of each sequence as read."""
        for sequence in self.sequences:
            sequence.length += length

    @property
    def prefixes(self) -> torch.Tensor | None:
        """The hashes (B,) int64 of the documents so far; None where no sequence has any."""
        return _stacked([sequence.prefix for sequence in self.sequences])

    def set_prefixes(self, prefixes: torch.Tensor) -> None:
        """Keep hashes (B,) of the documents with this pass."""
        for sequence, prefix in zip(self.sequences, prefixes.clone().unbind(), strict=True):
            sequence.prefix = prefix

    @property
    def totals(self) -> torch.Tensor | None:
        """The sums (B, d) over earlier positions; None where no sequence has any."""
        return _stacked([sequence.total for sequence in self.sequences])

    def set_totals(self, totals: torch.Tensor) -> None:
        """Keep sums (B, d) over all positions with those of this pass."""
        for sequence, total in zip(self.sequences, totals.clone().unbind(), strict=True):
            sequence.total = total


def _stacked(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Stack tensors of one shape, with zeros for None; None where all of them are."""
    known = next((part for part in parts if part is not None), None)
    if known is None:
        return None
    return torch.stack([torch.zeros_like(known) if part is None else part for part in parts])
