"""Which models and layouts can have their layers captured as CUDA graphs (``training.cuda_graphs``)."""

from __future__ import annotations

from megachiar.config.model import ModelConfig
from megachiar.config.sections import ParallelConfig, TrainingConfig
from megachiar.config.static_shapes import why_shapes_follow_routes


def why_not_captured(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> str | None:
    """Return why the layers of a run cannot be captured; None where they can."""
    if parallel.pipeline_size > 1:
        return f"parallel.pipeline_size is {parallel.pipeline_size}: a stage holds several micro-batches at a time"
    if parallel.tensor_size > 1:
        return f"parallel.tensor_size is {parallel.tensor_size}: ranks communicate within the layers"
    if parallel.zero_stage == 3:
        return "parallel.zero_stage is 3: weights are gathered anew for each pass, and lie elsewhere each time"
    if parallel.offload_optimizer:
        return "parallel.offload_optimizer is true: the host takes part in the backward pass"
    if training.activation_checkpoint_interval is not None:
        return "training.activation_checkpoint_interval is set: layers run again in the backward pass"
    if training.compile is not None:
        return f"training.compile is {training.compile}: one of the two starts the kernels of a layer"
    if not needs_static_shapes(model):
        return None
    if training.static_shapes is False:
        return "training.static_shapes is false: the host reads how many rows each operator gets"
    return why_shapes_follow_routes(model, parallel)


def needs_static_shapes(model: ModelConfig) -> bool:
    """Return whether a model has layers that can be captured with static shapes alone.

    Soft routers send every row through every operator.
    """
    return bool(model.routed_layers) and model.router.kind != "soft"
