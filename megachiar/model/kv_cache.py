"""What incremental decoding keeps of earlier positions."""

from __future__ import annotations

import torch


class LayerCache:
    """Keys and values of one operator of one layer, and sums for a running mean.

    Attributes:
        keys, values: (B, h, T so far, c); None before the first pass.
        positions: (B, T so far), of keys that are not those of all positions.
        total: (B, d) sum over positions so far, fp32 or fp64; None before the first pass.
    """

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.total: torch.Tensor | None = None

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, h, new, c) and return all of them."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values

    def extend_at(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As ``extend``, of keys at ``positions`` (B, new)."""
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], 1)
        return *self.extend(keys, values), self.positions


class DecodingCache:
    """Caches of all layers by name, and the number of positions they hold."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[str, LayerCache] = {}

    def layer(self, name: str) -> LayerCache:
        return self._layers.setdefault(name, LayerCache())
