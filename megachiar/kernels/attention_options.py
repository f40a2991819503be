"""The options of attention besides queries, keys and values: one value for all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megachiar.kernels.dropout import KeyedDropout


class DocumentRows(NamedTuple):
    """Where the document of each row begins and ends among all rows of a micro-batch.

    Attributes:
        firsts: (N,) int32, the first row of the document.
        ends: (N,) int32, the row behind the last one of the document.
    """

    firsts: torch.Tensor
    ends: torch.Tensor


class AttentionOptions(NamedTuple):
    """Options of an attention product. Those that belong to queries are in the order of the queries.

    Attributes:
        dropout: dropout of attention probabilities, with one key a query row; None for no dropout.
        first_head: number of the first head of the queries, where ranks share the heads; it enters the dropout keys.
        scale: factor of the products of queries and keys; 1 / sqrt(c) if None.
        document_starts: int64, first position of each query's document; the query sees no earlier key. None where each
            sequence is one document.
        document_rows: the same of all rows, where attention of all rows by Triton finds it ready; else None.
    """

    dropout: KeyedDropout | None = None
    first_head: int = 0
    scale: float | None = None
    document_starts: torch.Tensor | None = None
    document_rows: DocumentRows | None = None

    @property
    def drops(self) -> bool:
        """Whether any probability can be dropped."""
        return self.dropout is not None and self.dropout.probability > 0
