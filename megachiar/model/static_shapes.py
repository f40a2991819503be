"""Which runs train with shapes that do not depend on the routes (see ``static_layer``), and why others do not."""

from __future__ import annotations

import torch
from torch import nn

from megachiar.config.run import RunConfig
from megachiar.config.static_shapes import why_shapes_follow_routes
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


def why_not_static(config: RunConfig, device: torch.device) -> str | None:
    """Return why the routed layers of a run have no static shapes on ``device``; None where they have."""
    asked = config.training.static_shapes
    if asked is False:
        return "training.static_shapes is false"
    reason = why_shapes_follow_routes(config.model, config.parallel)
    if reason is not None or asked is True:
        return reason
    return gpu.why_not(device) or _why_not_by_kernels(config) or _why_packing_is_faster(config)


def _why_not_by_kernels(config: RunConfig) -> str | None:
    """Return what the Triton kernels do not take of a model; None where they take it."""
    model, dtype = config.model, DTYPES[config.precision.compute]
    rows = torch.empty(1, model.hidden_size, dtype=dtype, device="meta")
    if not triton_attention.supports(rows.view(1, model.num_attention_heads, -1)):
        return f"heads have no {', '.join(map(str, triton_attention.HEAD_SIZES))} channels"
    if not triton_norm.supports(rows):
        return f"hidden_size is above {triton_norm.WIDEST}"
    if not triton_rope.supports_both(2 * model.num_attention_heads, model.head_size, dtype):
        return f"all heads together have more than {triton_rope.WIDEST // 2} channels"
    return None


def _why_packing_is_faster(config: RunConfig) -> str | None:
    """Return why torch's attention of packed rows is preferred; None where it is not.

    It serves neither dropout nor documents.
    """
    is_plain = config.model.dropout == 0 and not config.data.document_mask
    if config.model.attention.keys == "routed" and is_plain and config.sequence_length > ROUTED_KEYS_BY_TRITON:
        return f"sequences above {ROUTED_KEYS_BY_TRITON} tokens with routed keys have a faster kernel for packed rows"
    return None


def describe_static_shapes(config: RunConfig, device: torch.device) -> str | None:
    """Return a phrase of a log about the shapes of routed layers.

    It is None for a model without any, and where the log says already why Triton kernels do not run.
    """
    reason = why_not_static(config, device)
    if not config.model.routed_layers or (reason is not None and reason == gpu.why_not(device)):
        return None
    return "routed layers of static shapes" if reason is None else f"shapes of routed layers by their routes ({reason})"
