"""CHIAR-Former and its attention-only baseline ("Chiaroscuro Attention", arXiv 2606.08327, architecture).

Shapes: B = sequences, T = tokens of a sequence, N = B * T rows, m = this rank's rows (N, or N / p with sequence
parallelism), d = channels, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.config.tasks import HeadConfig
from megachiar.model.batch_layout import lay_out
from megachiar.model.captured_layers import CapturedLayers
from megachiar.model.classifier import build_heads, classifier_loss, pool, real_lengths, touch_unused
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.init import initialise
from megachiar.model.kv_cache import DecodingCache
from megachiar.model.layer import Routes
from megachiar.model.layer_stack import RoutingStatistics, build_layer, run_layers, statistics, total_regulariser
from megachiar.model.norm import RowNorm
from megachiar.phases import phase
from megachiar.topology import SINGLE_RANK, TensorParallelGroup


class ModelOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        loss: mean cross-entropy in nats over targets that are not -100, fp32, without the regulariser; None without
            targets. It is the mean over tokens, or with a classification head over sequences.
        regulariser: scalar to add to the loss for training; 0 where there is none.
        token_losses: (B, T) fp32 without gradient, 0 where the target is -100, or (B,) with a classification head; None
            without targets.
        logits: (B, T, V), or (B, 1, V) with ``last_logits``; None with targets; (B, C) with a classification head.
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
        heads: the classification heads by the name of their task; none in a language model.

    Attributes:
        captured_layers: runs the layers in training where they are captured as graphs; None where they are not.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        group: TensorParallelGroup = SINGLE_RANK,
        checkpoint_interval: int | None = None,
        document_end: int | None = None,
        heads: Mapping[str, HeadConfig] | None = None,
    ):
        super().__init__()
        self.document_end = document_end
        self.config = config
        self.seed = seed
        self.group = group
        self.checkpoint_interval = checkpoint_interval
        self.captured_layers: CapturedLayers | None = None
        self.embedding = TiedEmbedding(config, group)
        self.layers = nn.ModuleList(build_layer(config, index, group) for index in range(config.num_layers))
        self.norm = RowNorm(config.hidden_size, config.norm_epsilon, group)
        self.heads = dict(heads or {})
        self.classifiers = build_heads(config, self.heads)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        *,
        cache: DecodingCache | None = None,
        head: str | None = None,
        routes: Routes | None = None,
        last_logits: bool = False,
    ) -> ModelOutput:
        """Compute losses against targets, or logits without them.

        Args:
            tokens: (B, T) int64, the same on all ranks of the group; with a classification head padded with -1.
            targets: (B, T) int64, or (B,) with a classification head; -100 where there is none; None for logits.
            sample_ids: (B,) int64, the number of each sequence, which keys its dropout and its random routes: in
                training that of the sample in the run, in evaluation that of the window in its set. 0 to B - 1 if None.
            cache: the caches of earlier positions; this pass adds its own. All positions of a sequence are of one
                document then.
            head: the task whose classification head is asked; None for the language model.
            routes: (B * T,) by the name of a layer, such as ``layers.1``: routes that the layer takes instead of those
                of its router. A routed layer that is missing there decides, and writes its routes. None in training.
            last_logits: whether only the logits of the last position of each sequence are wanted, as (B, 1, V).
        """
        if sample_ids is None:
            sample_ids = torch.arange(len(tokens), device=tokens.device)
        lengths = None
        if head is not None:
            tokens, lengths = real_lengths(tokens, self.heads[head])
        layout = lay_out(
            self.config,
            sample_ids,
            tokens.shape[1],
            tokens=tokens,
            document_end=self.document_end if head is None else None,
            dropout_seed=self.seed if self.training else None,
            group=self.group,
            cache=cache,
            lengths=lengths,
        )
        x = self.embedding(tokens.flatten(), layout=layout)  # (m, d)
        interval = self.checkpoint_interval if self.training else None
        trains = self.training and torch.is_grad_enabled() and cache is None and routes is None
        if self.captured_layers is not None and trains:
            x, outputs = self.captured_layers.run(x, layout)
        else:
            x, outputs = run_layers(list(self.layers), x, layout, cache, interval, routes)
        if cache is not None:
            cache.advance(layout.length)
        regulariser, report = total_regulariser(outputs, x.device), statistics(outputs, layout, x.device)
        x = self.norm(x)
        if self.training:
            x = touch_unused(self.classifiers, head, x)
        if head is not None:
            logits = self.classifiers[head](pool(x, layout), layout)
            with phase("loss"):
                of_labels = classifier_loss(logits, targets) if targets is not None else None
            return ModelOutput(
                loss=of_labels.loss if of_labels is not None else None,
                regulariser=regulariser,
                token_losses=of_labels.sequence_losses if of_labels is not None else None,
                logits=logits.detach(),
                statistics=report,
            )
        if targets is None:
            if last_logits and not self.group.shards_rows:
                x = x.unflatten(0, tokens.shape)[:, -1]
            return ModelOutput(
                loss=None,
                regulariser=regulariser,
                token_losses=None,
                logits=self.embedding(x).unflatten(0, (len(tokens), -1)),
                statistics=report,
            )
        with phase("loss"):
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
    heads: Mapping[str, HeadConfig] | None = None,
) -> ChiarFormer:
    """Build a model with this rank's part of the initial weights; on ``device="meta"`` it has shapes alone.

    Arguments are those of ``ChiarFormer``; ``seed`` is for the initial weights too.
    """
    device = torch.device(device)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        model = ChiarFormer(config, seed, group, checkpoint_interval, document_end, heads)
    if device.type != "meta":
        initialise(model, config, seed, group)
    return model.to(device=device, dtype=dtype)
