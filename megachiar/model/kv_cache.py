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
        self._keys: torch.Tensor | None = None  # (1, h, capacity, c)
        self._values: torch.Tensor | None = None  # the same, or the same tensor

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add entries (h, new, c). Where ``values`` is ``keys``, both are stored once."""
        new = keys.shape[1]
        if self._keys is None or self._values is None or self.count + new > self._keys.shape[2]:
            self._grow(keys, values is keys, self.count + new)
        assert self._keys is not None and self._values is not None
        self._keys.narrow(2, self.count, new).copy_(keys)
        if self._values is not self._keys:
            self._values.narrow(2, self.count, new).copy_(values)
        self.count += new

    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (1, h, T, c), at least one of them, as views."""
        assert self._keys is not None and self._values is not None, "a buffer is read after something was written"
        return self._keys.narrow(2, 0, self.count), self._values.narrow(2, 0, self.count)

    @property
    def num_bytes(self) -> int:
        """The bytes that it takes, its room included."""
        kept = {id(part): part.nbytes for part in (self._keys, self._values) if part is not None}
        return sum(kept.values())

    def _grow(self, like: torch.Tensor, are_shared: bool, count: int) -> None:
        """Make room for ``count`` entries and some more, of the shape and type of ``like`` (h, new, c)."""
        heads, _, channels = like.shape
        capacity = count + max(LEAST_ROOM, count // ROOM)

        def larger(old: torch.Tensor | None) -> torch.Tensor:
            buffer = like.new_empty(1, heads, capacity, channels)
            if old is not None:
                buffer.narrow(2, 0, self.count).copy_(old.narrow(2, 0, self.count))
            return buffer

        self._keys = larger(self._keys)
        self._values = self._keys if are_shared else larger(self._values)


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

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add keys and values (B, h, S, c) of all rows of the pass."""
        for buffer, of_keys, of_values in zip(self._buffers, keys, values if values is not keys else keys, strict=True):
            buffer.append(of_keys, of_values if values is not keys else of_keys)

    def append_routed(self, keys: torch.Tensor, values: torch.Tensor, rows: RoutedRows) -> None:
        """Add keys and values (n, h, c) of the routed rows alone."""
        counts = rows.counts()
        for buffer, of_keys, of_values in zip(self._buffers, keys.split(counts), values.split(counts), strict=True):
            if len(of_keys):
                buffer.append(of_keys.transpose(0, 1), of_values.transpose(0, 1))

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
        options, counts = AttentionOptions(scale=scale), rows.counts()
        mixed = []
        for number, (buffer, queries) in enumerate(zip(self._buffers, q.split(counts), strict=True)):
            if not len(queries):
                continue
            keys, values = buffer.entries()
            if rows.length == 1 or keys_are_routed:  # the entries of these queries are the newest ones
                of_sequence = causal_attention(queries.transpose(0, 1)[None], keys, values, options)
                mixed.append(of_sequence[0].transpose(0, 1))
            else:
                mixed.append(routed_attention(queries, keys, values, rows.of_sequence(number, counts), options))
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
