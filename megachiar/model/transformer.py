"""CHIAR-Former and its attention-only baseline (paper: architecture; "Chiaroscuro Attention", arXiv 2606.08327).

Shapes: B sequences, T tokens of each, N = B * T rows, d channels, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.model.cache import DecodingCache
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.grid import Grid
from megachiar.model.init import initialise
from megachiar.model.layer import LayerOutput
from megachiar.model.meta_router import MetaRouter
from megachiar.model.stages import build_layers


class RoutingStatistics(NamedTuple):
    """What the routers did in a forward pass; fp32, without gradient.

    Attributes:
        attention_share, rbf_share: (L,) share of tokens that took the operator.
        entropy: (L,) mean spectral entropy H; nan where a layer does not route.
        gate: () mean g of the MetaRouter; nan without one.
    """

    attention_share: torch.Tensor
    rbf_share: torch.Tensor
    entropy: torch.Tensor
    gate: torch.Tensor


class ModelOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        loss: mean cross-entropy a token in nats over targets that are not -100, fp32, without the regulariser; None
            without targets.
        regulariser: scalar to add to the loss for training; 0 where there is none.
        token_losses: (B, T) fp32 without gradient, 0 where the target is -100; None without targets.
        logits: (B, T, V); None with targets.
        statistics: of the routing.
    """

    loss: torch.Tensor | None
    regulariser: torch.Tensor
    token_losses: torch.Tensor | None
    logits: torch.Tensor | None
    statistics: RoutingStatistics


class ChiarFormer(nn.Module):
    """Embedding, layers, final LayerNorm and a head tied to the embedding. No absolute position embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = TiedEmbedding(config)
        has_gate = config.kind == "chiar" and config.meta_router.pool != "none"
        self.meta_router = MetaRouter(config) if has_gate else None
        self.layers = nn.ModuleList(build_layers(config))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, *, cache: DecodingCache | None = None
    ) -> ModelOutput:
        """
        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, -100 where there is none; with them the result has losses, else logits.
            cache: of earlier positions; it is extended by these.
        """
        grid = Grid(*tokens.shape, past=cache.length if cache is not None else 0)
        x = F.dropout(self.embedding(tokens.flatten()), self.config.dropout, self.training)  # (N, d)
        x, outputs, gate = self._stack(x, grid, cache)
        if cache is not None:
            cache.length += grid.length
        statistics = _statistics(outputs, gate)
        added = [output.regulariser for output in outputs if output.regulariser is not None]
        regulariser = sum(added) if added else torch.zeros((), dtype=torch.float32, device=x.device)
        x = self.norm(x)
        if targets is None:
            return ModelOutput(None, regulariser, None, self.embedding(x).view(*tokens.shape, -1), statistics)
        result = self.embedding(x, targets.flatten())
        return ModelOutput(result.loss, regulariser, result.token_losses.view(tokens.shape), None, statistics)

    def _stack(
        self, x: torch.Tensor, grid: Grid, cache: DecodingCache | None
    ) -> tuple[torch.Tensor, list[LayerOutput], torch.Tensor | None]:
        """Rows after all layers, what each layer reported, and the gate of layer 1."""
        outputs, gate = [], None
        for index, layer in enumerate(self.layers):
            output = layer(x, grid, cache)
            if index == 0 and self.meta_router is not None:
                gate = self.meta_router(x, grid, cache and cache.layer("meta_router"))
                x = gate * output.rows + (1 - gate) * x
            else:
                x = output.rows
            outputs.append(output)
        return x, outputs, gate

    def parameter_count(self) -> int:
        """Trained numbers; the tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_model(
    config: ModelConfig, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ChiarFormer:
    """A model with initial weights; ``device="meta"`` gives shapes alone."""
    device = torch.device(device)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        model = ChiarFormer(config)
    if device.type != "meta":
        initialise(model, config, seed)
    return model.to(device=device, dtype=dtype)


def _statistics(outputs: list[LayerOutput], gate: torch.Tensor | None) -> RoutingStatistics:
    shares, rbf, entropy = zip(*((o.attention_share, o.rbf_share, o.entropy) for o in outputs), strict=True)
    mean_gate = torch.full_like(shares[0], torch.nan) if gate is None else gate.detach().float().mean()
    return RoutingStatistics(
        torch.stack(shares).detach(), torch.stack(rbf).detach(), torch.stack(entropy).detach(), mean_gate
    )
