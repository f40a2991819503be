"""How the rows of a micro-batch lie: sequence by sequence, position by position, in blocks over ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from megachiar.kernels.dropout import KeyedDropout, row_keys
from megachiar.kernels.routed_rows import RoutedRows
from megachiar.topology import SINGLE_RANK, TensorParallelGroup


class DropoutKeys(NamedTuple):
    """Keys of the rows' dropout masks: int64 numbers, one a row.

    Attributes:
        all_rows: (N,) of all rows, as they lie between column- and row-parallel products.
        local_rows: (N / p,) of this rank's rows with sequence parallelism; ``all_rows`` without.
    """

    all_rows: torch.Tensor
    local_rows: torch.Tensor


class BatchLayout(NamedTuple):
    """Row ``b * length + t`` is the token at position ``cache_length + t`` of sequence ``b``.

    With sequence parallelism each rank of the tensor group has a block of N / p consecutive rows.

    Attributes:
        sequences: B.
        length: tokens of each sequence in this pass.
        cache_length: positions before them that a decoding cache holds.
        group: the ranks that share the rows or the layers.
        dropout_keys: of the rows; None where there is no dropout.
        document_starts: (B, T) position at which each token's document begins; None where a sequence is one document.
    """

    sequences: int
    length: int
    cache_length: int = 0
    group: TensorParallelGroup = SINGLE_RANK
    dropout_keys: DropoutKeys | None = None
    document_starts: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """N, of all ranks together."""
        return self.sequences * self.length

    @property
    def local_slice(self) -> slice:
        """This rank's rows among all."""
        if not self.group.shards_rows:
            return slice(0, self.num_rows)
        block = self.num_rows // self.group.size
        return slice(self.group.rank * block, (self.group.rank + 1) * block)

    def positions(self, device: torch.device) -> torch.Tensor:
        """Position (length,) of each token within its sequence."""
        return torch.arange(self.cache_length, self.cache_length + self.length, device=device)

    def local_positions(self, device: torch.device) -> torch.Tensor:
        """Position of each of this rank's rows within its sequence."""
        local = self.local_slice
        return self.cache_length + torch.arange(local.start, local.stop, device=device) % self.length

    def routed_rows(self, indices: torch.Tensor) -> RoutedRows:
        """The rows with these numbers (n,) among all, as attention takes them."""
        return RoutedRows(indices, self.sequences, self.length)

    def document_starts_of(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        """``document_starts`` (n,) of rows by their numbers among all; (B, T) of all without."""
        if self.document_starts is None or rows is None:
            return self.document_starts
        return self.document_starts.flatten().index_select(0, rows)

    def with_dropout_keys(self, seed: int, sample_ids: torch.Tensor) -> BatchLayout:
        """With keys for dropout: of the run's seed and each sequence's number (B,) in the order of samples."""
        all_rows = row_keys(seed, sample_ids[:, None], self.positions(sample_ids.device)).flatten()
        return self._replace(dropout_keys=DropoutKeys(all_rows, all_rows[self.local_slice]))


def find_document_starts(tokens: torch.Tensor, end: int) -> torch.Tensor:
    """Position (B, T) at which each token's document begins; a document ends with the token ``end``, inclusive."""
    opens = F.pad(tokens[:, :-1] == end, (1, 0))
    return (opens * torch.arange(tokens.shape[1], device=tokens.device)).cummax(1).values


def dropout_of(probability: float, keys: torch.Tensor, layer: int, place: int) -> KeyedDropout:
    """Dropout at a place of a layer, both counted from 0; the embedding's is layer -1."""
    return KeyedDropout(probability, keys, (layer + 1) * 8 + place)
