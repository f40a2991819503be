"""The cache of incremental decoding: keys, values and running sums of earlier positions.

Shapes: B = sequences, T = cached positions, h = heads, c = channels of a head, d = channels.
"""

from __future__ import annotations

import torch


class LayerCache:
    """The cache of one operator of one layer.

    Attributes:
        keys, values: (B, h, T, c); None before the first pass.
        positions: (B, T) int64, positions of the keys, where keys belong to routed tokens alone; else None.
        total: (B, d) sum over the positions, fp32 or fp64, for a running mean; None before the first pass.
    """

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.total: torch.Tensor | None = None

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, h, new, c) and return all of them: (B, h, T, c) each."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values

    def extend_at(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append keys and values (B, h, new, c) of keys at ``positions`` (B, new), and return all of the three."""
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], 1)
        return *self.extend(keys, values), self.positions


class DecodingCache:
    """The caches of all layers.

    Attributes:
        length: number of positions that the caches hold.
        prefix: (B,) int64, hash of each document so far, where random routes are drawn by it; else None.
    """

    def __init__(self) -> None:
        self.length = 0
        self.prefix: torch.Tensor | None = None
        self._layers: dict[str, LayerCache] = {}

    def layer(self, name: str) -> LayerCache:
        """Return the cache of the operator with this name (``layers.INDEX.OPERATOR``); it is empty at first."""
        return self._layers.setdefault(name, LayerCache())
