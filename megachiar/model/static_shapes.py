"""Which runs train with shapes that do not depend on the routes (see ``static_layer``), and why others do not."""

from __future__ import annotations

import torch
from torch import nn

from megachiar.config.cuda_graphs import needs_static_shapes
from megachiar.config.model import ModelConfig
from megachiar.config.run import RunConfig
from megachiar.config.static_shapes import why_shapes_follow_routes
from megachiar.errors import UserError
from megachiar.kernels import gpu, triton_attention, triton_norm, triton_rope
from megachiar.kernels.attention import ROUTED_KEYS_BY_TRITON
from megachiar.model.dtypes import DTYPES
from megachiar.model.layer import RoutedLayer


def use_static_shapes(model: nn.Module) -> None:
    """Let all routed layers of ``model`` compute with static shapes from now on, in every pass without a cache."""
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            module.has_static_shapes = True


def has_static_shapes(config: RunConfig, device: torch.device) -> bool:
    """Return whether the routed layers of a run have static shapes on ``device``."""
    return bool(config.model.routed_layers) and why_not_static(config, device) is None


def plans_static_shapes(config: RunConfig, device: str) -> bool:
    """Return whether the routed layers of a run would have static shapes on a device that need not be here.

    ``device`` is its type, ``"cuda"`` for a GPU with Triton or ``"cpu"``.
    """
    has_kernels = device == "cuda" and config.precision.kernels != "torch"
    reason = _why_not(config, None if has_kernels else "there are no kernels")
    return bool(config.model.routed_layers) and reason is None


def why_not_static(config: RunConfig, device: torch.device) -> str | None:
    """Return why the routed layers of a run have no static shapes on ``device``; None where they have."""
    return _why_not(config, gpu.why_not(device))


def _why_not(config: RunConfig, without_kernels: str | None) -> str | None:
    """Return why the routed layers of a run have no static shapes; ``without_kernels`` says why Triton does not run."""
    asked = config.training.static_shapes
    if asked is False:
        return "training.static_shapes is false"
    reason = why_shapes_follow_routes(config.model, config.parallel)
    if reason is not None or asked is True or config.training.cuda_graphs is not None:
        return reason
    return (
        without_kernels
        or _why_kernels_do_not_serve(config.model, DTYPES[config.precision.compute])
        or _why_others_are_faster(config.model, config.sequence_length, config.data.document_mask)
    )


def check_kernels_of_graphs(config: RunConfig, device: torch.device) -> None:
    """Check that layers have kernels that can be captured, where they are to be.

    Attention without them reads on the host where documents, dropout masks and routed rows are.

    Raises:
        UserError: on this GPU they have none. A CPU records what it has instead.
    """
    if config.training.cuda_graphs is None or device.type == "cpu":
        return
    model, dtype = config.model, DTYPES[config.precision.compute]
    if needs_static_shapes(model):
        unserved = _why_kernels_do_not_serve(model, dtype)
    elif model.routed_layers or model.dropout or config.data.document_mask:
        unserved = _why_attention_does_not_serve(model, dtype)
    else:
        return
    if reason := gpu.why_not(device) or unserved:
        raise UserError(
            "training.cuda_graphs",
            f"layers need Triton kernels to be captured, but {reason}",
            "set training.cuda_graphs to null",
        )


def why_kernels_do_not(
    model: ModelConfig, length: int, has_documents: bool, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why the kernels of static shapes do not serve a model, or are not the fastest; None where they are.

    Args:
        model: config of the model.
        length: tokens of a sequence.
        has_documents: whether tokens see their document alone.
        device: where the model runs.
        dtype: what it computes in.
    """
    return (
        gpu.why_not(device)
        or _why_kernels_do_not_serve(model, dtype)
        or _why_others_are_faster(model, length, has_documents)
    )


def _why_kernels_do_not_serve(model: ModelConfig, dtype: torch.dtype) -> str | None:
    """Return why the kernels of static shapes do not take a model's sizes; None where they do."""
    rows = torch.empty(1, model.hidden_size, dtype=dtype, device="meta")
    if reason := _why_attention_does_not_serve(model, dtype):
        return reason
    if not triton_norm.supports(rows):
        return f"hidden_size is above {triton_norm.WIDEST}"
    if not triton_rope.supports_both(2 * model.num_attention_heads, model.head_size, dtype):
        return f"all heads together have more than {triton_rope.WIDEST // 2} channels"
    return None


def _why_attention_does_not_serve(model: ModelConfig, dtype: torch.dtype) -> str | None:
    """Return why Triton's attention does not take a model's heads; None where it does."""
    heads = torch.empty(1, model.num_attention_heads, model.head_size, dtype=dtype, device="meta")
    if not triton_attention.supports(heads):
        return f"heads have no {', '.join(map(str, triton_attention.HEAD_SIZES))} channels"
    return None


def _why_others_are_faster(model: ModelConfig, length: int, has_documents: bool) -> str | None:
    """Return why other kernels than those of static shapes are faster; None where none are."""
    packs = model.attention.keys == "routed" and model.dropout == 0 and not has_documents
    if packs and length > ROUTED_KEYS_BY_TRITON:
        return f"routed keys of more than {ROUTED_KEYS_BY_TRITON} tokens are packed for a faster kernel"
    return None


def describe_static_shapes(config: RunConfig, device: torch.device) -> str | None:
    """Return a phrase of a log about the shapes of routed layers.

    It is None for a model without any, and where the log says already why Triton kernels do not run.
    """
    reason = why_not_static(config, device)
    if not config.model.routed_layers or (reason is not None and reason == gpu.why_not(device)):
        return None
    return "routed layers of static shapes" if reason is None else f"shapes of routed layers by their routes ({reason})"
