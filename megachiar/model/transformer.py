"""CHIAR-Former and its attention-only baseline ("Chiaroscuro Attention", arXiv 2606.08327, architecture).

Shapes: B = sequences, T = tokens of a sequence, N = B * T rows, m = this rank's rows (N, or N / p with sequence
parallelism), d = channels, V = vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.model.batch_layout import lay_out
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.init import initialise
from megachiar.model.kv_cache import DecodingCache
from megachiar.model.layer import Routes
from megachiar.model.layer_stack import RoutingStatistics, build_layer, run_layers, statistics, total_regulariser
from megachiar.model.norm import RowNorm
from megachiar.topology import SINGLE_RANK, TensorParallelGroup


class ModelOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        loss: mean cross-entropy a token in nats over targets that are not -100, fp32, without the regulariser; None
            without targets.
        regulariser: scalar to add to the loss for training; 0 where there is none.
        token_losses: (B, T) fp32 without gradient, 0 where the target is -100; None without targets.
        logits: (B, T, V); None with targets.
        statistics: of the routers.
    """

    loss: torch.Tensor | None
    regulariser: torch.Tensor
    token_losses: torch.Tensor | None
    logits: torch.Tensor | None
    statistics: RoutingStatistics


class ChiarFormer(nn.Module):
    """Embedding, layers, a final LayerNorm and a head that is tied to the embedding. Positions are rotary alone.

    Args:
        config: the model's config.
        seed: the run's seed, for dropout.
        group: the ranks that share the layers.
        checkpoint_interval: number of layers whose activations are recomputed together in the backward pass; None
            keeps all activations.
        document_end: the token that ends a document, if no token is to see another document (``data.document_mask``).
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        group: TensorParallelGroup = SINGLE_RANK,
        checkpoint_interval: int | None = None,
        document_end: int | None = None,
    ):
        super().__init__()
        self.document_end = document_end
        self.config = config
        self.seed = seed
        self.group = group
        self.checkpoint_interval = checkpoint_interval
        self.embedding = TiedEmbedding(config, group)
        self.layers = nn.ModuleList(build_layer(config, index, group) for index in range(config.num_layers))
        self.norm = RowNorm(config.hidden_size, config.norm_epsilon, group)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        *,
        cache: DecodingCache | None = None,
        routes: Routes | None = None,
    ) -> ModelOutput:
        """Compute losses against targets, or logits without them.

        Args:
            tokens: (B, T) int64, the same on all ranks of the group.
            targets: (B, T) int64, -100 where there is none; None for logits.
            sample_ids: (B,) int64, the number of each sequence, which keys its dropout and its random routes: in
                training that of the sample in the run, in evaluation that of the window in its set. 0 to B - 1 if None.
            cache: the caches of earlier positions; this pass adds its own. All positions of a sequence are of one
                document then.
            routes: (B * T,) by the name of a layer, such as ``layers.1``: routes that the layer takes instead of those
                of its router. A routed layer that is missing there decides, and writes its routes. None in training.
        """
        if sample_ids is None:
            sample_ids = torch.arange(len(tokens), device=tokens.device)
        layout = lay_out(
            self.config,
            sample_ids,
            tokens.shape[1],
            tokens=tokens,
            document_end=self.document_end,
            dropout_seed=self.seed if self.training else None,
            group=self.group,
            cache=cache,
        )
        x = self.embedding(tokens.flatten(), layout=layout)  # (m, d)
        interval = self.checkpoint_interval if self.training else None
        x, outputs = run_layers(list(self.layers), x, layout, cache, interval, routes)
        if cache is not None:
            cache.length += layout.length
        regulariser, report = total_regulariser(outputs, x.device), statistics(outputs)
        x = self.norm(x)
        if targets is None:
            return ModelOutput(
                loss=None,
                regulariser=regulariser,
                token_losses=None,
                logits=self.embedding(x).view(*tokens.shape, -1),
                statistics=report,
            )
        result = self.embedding(x, targets.flatten())
        return ModelOutput(
            loss=result.loss,
            regulariser=regulariser,
            token_losses=result.token_losses.view(tokens.shape),
            logits=None,
            statistics=report,
        )

    def parameter_count(self) -> int:
        """Return how many numbers this rank trains; the tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_model(
    config: ModelConfig,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    group: TensorParallelGroup = SINGLE_RANK,
    checkpoint_interval: int | None = None,
    document_end: int | None = None,
) -> ChiarFormer:
    """Build a model with this rank's part of the initial weights; on ``device="meta"`` it has shapes alone.

    Arguments are those of ``ChiarFormer``; ``seed`` is for the initial weights too.
    """
    device = torch.device(device)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        model = ChiarFormer(config, seed, group, checkpoint_interval, document_end)
    if device.type != "meta":
        initialise(model, config, seed, group)
    return model.to(device=device, dtype=dtype)
