"""The layout of a micro-batch: rows in the order of sequences and positions, in blocks over ranks.

Shapes: B = sequences, T = tokens of a sequence in this pass, N = B * T rows, p = ranks of the tensor-parallel group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from megachiar.config.model import ModelConfig
from megachiar.kernels.attention_options import DocumentRows
from megachiar.kernels.dropout import KeyedDropout, row_keys
from megachiar.kernels.routed_rows import RoutedRows
from megachiar.model.kv_cache import DecodingCache
from megachiar.model.route_keys import hash_prefixes, keys_of_documents, keys_of_samples
from megachiar.topology import SINGLE_RANK, TensorParallelGroup


class DropoutKeys(NamedTuple):
    """Keys of the rows' dropout masks: one int64 number a row.

    Attributes:
        all_rows: (N,), the keys of all rows, for dropout between column- and row-parallel products.
        local_rows: (N / p,), the keys of this rank's rows with sequence parallelism; else ``all_rows``.
    """

    all_rows: torch.Tensor
    local_rows: torch.Tensor


class BatchLayout(NamedTuple):
    """Row ``b * length + t`` is token ``t`` of this pass in sequence ``b``.

    It is at position ``t`` of the sequence, or behind the positions that a decoding cache holds of it.

    With sequence parallelism each rank of the tensor-parallel group has a block of N / p consecutive rows.

    Attributes:
        sequences: B.
        length: T, tokens of each sequence in this pass.
        group: the ranks that share the layers, and with sequence parallelism the rows.
        dropout_keys: the keys of the rows' dropout masks; None where there is no dropout.
        document_starts: (B, T) int64, first position of each token's document; None where each sequence is one
            document.
        lengths: (B,) int64, how many tokens of each sequence are real, before its padding; None where all are.
        row_weights: (m, 1) fp32 of this rank's rows, with which ``mean_of_rows`` leaves out padding; None where there
            is none.
        cached_positions: (B, T) int64, the positions of the tokens behind a decoding cache; None without one.
        route_keys: (N / p,) int64, what a random router draws the routes of this rank's rows by; None where none draws.
        document_rows: the bounds of the documents that Triton kernels read; None where nobody asked for them.
    """

    sequences: int
    length: int
    group: TensorParallelGroup = SINGLE_RANK
    dropout_keys: DropoutKeys | None = None
    document_starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    row_weights: torch.Tensor | None = None
    cached_positions: torch.Tensor | None = None
    route_keys: torch.Tensor | None = None
    document_rows: DocumentRows | None = None

    @property
    def num_rows(self) -> int:
        """N, the rows of all ranks together."""
        return self.sequences * self.length

    @property
    def local_slice(self) -> slice:
        """The slice of this rank's rows among all N."""
        if not self.group.shards_rows:
            return slice(0, self.num_rows)
        block = self.num_rows // self.group.size
        return slice(self.group.rank * block, (self.group.rank + 1) * block)

    def positions(self, device: torch.device) -> torch.Tensor:
        """Return the positions of this pass's tokens within their sequences: (T,), or (B, T) behind a cache."""
        return torch.arange(self.length, device=device) if self.cached_positions is None else self.cached_positions

    def local_positions(self, device: torch.device) -> torch.Tensor:
        """Return the position of each of this rank's rows within its sequence."""
        local = self.local_slice
        if self.cached_positions is not None:
            return self.cached_positions.flatten()[local]
        return torch.arange(local.start, local.stop, device=device) % self.length

    def local_sequences(self, device: torch.device) -> torch.Tensor:
        """Return the number of the sequence of each of this rank's rows."""
        local = self.local_slice
        return torch.arange(local.start, local.stop, device=device) // self.length

    def with_lengths(self, lengths: torch.Tensor | None) -> BatchLayout:
        """Return this layout with padding after the first ``lengths`` (B,) tokens of the sequences."""
        if lengths is None:
            return self
        device = lengths.device
        is_real = self.local_positions(device) < lengths.index_select(0, self.local_sequences(device))
        ranks = self.group.size if self.group.shards_rows else 1
        return self._replace(lengths=lengths, row_weights=(is_real * (ranks / lengths.sum()))[:, None].float())

    def mean_of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean (...) of values (m, ...) over this rank's rows, padding left out.

        With padding and sequence parallelism it is weighted such that the mean over the ranks is that of all real rows.
        """
        if self.row_weights is None:
            return values.mean(0)
        weights = self.row_weights.to(values.dtype)
        return (weights * values.reshape(len(values), -1)).sum(0).reshape(values.shape[1:])

    def all_indices(self, device: torch.device) -> torch.Tensor:
        """Return the indices (N,) of all rows."""
        return torch.arange(self.num_rows, device=device)

    def routed_rows(self, indices: torch.Tensor) -> RoutedRows:
        """Return the rows at ``indices`` (n,) among all N in the form that attention takes."""
        return RoutedRows(indices, self.sequences, self.length)

    def document_starts_of(self, indices: torch.Tensor | None) -> torch.Tensor | None:
        """Return the document starts (n,) of the rows at ``indices`` among all N, or (B, T) of all if that is None."""
        if self.document_starts is None or indices is None:
            return self.document_starts
        return self.document_starts.flatten().index_select(0, indices)

    def with_document_rows(self) -> BatchLayout:
        """Return this layout with the bounds of documents, where it has documents."""
        if self.document_starts is None or self.document_rows is not None:
            return self
        starts = self.document_starts
        position = torch.arange(self.length, device=starts.device)
        openings = F.pad(torch.where(starts == position, position, self.length)[:, 1:], (0, 1), value=self.length)
        ends = openings.flip(1).cummin(1).values.flip(1)
        first = torch.arange(0, self.num_rows, self.length, device=starts.device)[:, None]
        return self._replace(document_rows=DocumentRows(*((x + first).flatten().int() for x in (starts, ends))))

    def with_dropout_keys(self, seed: int, sample_ids: torch.Tensor) -> BatchLayout:
        """Return this layout with dropout keys: functions of the run's seed, the sample ids (B,) and the positions."""
        all_rows = row_keys(seed, sample_ids[:, None], self.positions(sample_ids.device)).flatten()
        return self._replace(dropout_keys=DropoutKeys(all_rows, all_rows[self.local_slice]))


def lay_out(
    config: ModelConfig,
    sample_ids: torch.Tensor,
    length: int,
    *,
    tokens: torch.Tensor | None = None,
    document_end: int | None = None,
    dropout_seed: int | None = None,
    group: TensorParallelGroup = SINGLE_RANK,
    cache: DecodingCache | None = None,
    lengths: torch.Tensor | None = None,
) -> BatchLayout:
    """Return the layout of a micro-batch, with all keys that the layers of the model need.

    Args:
        config: config of the model.
        sample_ids: (B,) int64, number of each sequence: it keys dropout and random routes.
        length: T, tokens of each sequence in this pass.
        tokens: (B, T) int64; only read where sequences have documents.
        document_end: token that ends a document; None where each sequence is one document.
        dropout_seed: seed of the run; None in evaluation, which drops nothing.
        group: the ranks that share the layers.
        cache: of earlier positions, whose hashes of the documents this pass extends. All positions of a sequence are
            of one document then.
        lengths: (B,) int64, how many tokens of each sequence are no padding; None where all are.
    """
    cached_positions = None
    if cache is not None:
        assert max(cache.lengths) + length <= config.max_sequence_length, (
            "whoever decodes keeps within the longest sequence"
        )
        cached_positions = _positions_behind(cache, length, sample_ids.device)
    layout = BatchLayout(len(sample_ids), length, group=group, cached_positions=cached_positions)
    layout = layout.with_lengths(lengths)
    if dropout_seed is not None and config.dropout:
        layout = layout.with_dropout_keys(dropout_seed, sample_ids)
    if document_end is not None and cache is None:
        assert tokens is not None, "documents are found by their tokens"
        layout = layout._replace(document_starts=find_document_starts(tokens, document_end))
    if not config.draws_tokens:
        return layout
    positions, seed = layout.positions(sample_ids.device), config.router.seed
    if document_end is None:
        keys = keys_of_samples(seed, sample_ids, positions)
    else:
        assert tokens is not None, "documents are known by their tokens"
        starts = layout.document_starts if layout.document_starts is not None else torch.zeros_like(tokens)
        prefixes = hash_prefixes(tokens, starts, positions, cache.prefixes if cache is not None else None)
        if cache is not None:
            cache.set_prefixes(prefixes[:, -1])
        keys = keys_of_documents(seed, prefixes)
    return layout._replace(route_keys=keys.flatten()[layout.local_slice])


def _positions_behind(cache: DecodingCache, length: int, device: torch.device) -> torch.Tensor:
    """Return the positions (B, T) of the next ``length`` tokens of the sequences of ``cache``."""
    return torch.tensor(cache.lengths, device=device)[:, None] + torch.arange(length, device=device)


def find_document_starts(tokens: torch.Tensor, end: int) -> torch.Tensor:
    """Return the first position (B, T) of the document of each token (B, T).

    The token ``end`` ends a document and belongs to it.
    """
    opens = F.pad(tokens[:, :-1] == end, (1, 0))
    return (opens * torch.arange(tokens.shape[1], device=tokens.device)).cummax(1).values


def dropout_of(probability: float, keys: torch.Tensor, layer: int, site: int) -> KeyedDropout:
    """Return the dropout at site ``site`` of layer ``layer``, both counted from 0; the embedding is layer -1."""
    return KeyedDropout(probability, keys, dropout_site(layer, site))


def dropout_site(layer: int, site: int) -> int:
    """Return the number in the model of site ``site`` of layer ``layer``, as in ``dropout_of``."""
    return (layer + 1) * 8 + site
