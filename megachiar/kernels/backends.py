"""A description of the implementation of each operation, and of its reason, for the first lines of a log."""

from __future__ import annotations

import torch

from megachiar.kernels import (
    dct,
    gpu,
    triton_attention,
    triton_cross_entropy,
    triton_factored,
    triton_norm,
    triton_rope,
)


def describe_backends(hidden_size: int, heads: int, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return phrases such as "Triton for routed attention, norms" for a model in ``dtype`` on ``device``."""
    rows = torch.empty(1, hidden_size, dtype=dtype, device="meta")
    by_head = rows.view(1, heads, -1)
    transform = "FFT" if dct.by_fft(hidden_size, device) else "matrix product"
    why_not = gpu.why_not(device)
    if why_not is not None:
        return [f"torch, with SDPA for attention and {transform} for the DCT ({why_not})"]
    tables = rows.new_empty(1, 1, by_head.shape[-1])
    sizes = ", ".join(map(str, triton_attention.HEAD_SIZES))
    widest = triton_factored.WIDEST // rows.element_size()
    widths = f"hidden_size is no power of two from {triton_factored.NARROWEST} to {widest}"
    choices = (
        ("routed attention", triton_attention.supports(by_head), f"torch SDPA: heads have no {sizes} channels"),
        ("spectral entropy", triton_factored.supports(rows), f"torch, matrix product: {widths}"),
        ("norms", triton_norm.supports(rows), f"torch: hidden_size is above {triton_norm.WIDEST}"),
        ("RoPE", triton_rope.supports(by_head, tables), "torch: a head has too many channels, or an odd number"),
        ("loss", triton_cross_entropy.supports(rows), "torch"),
    )
    by_triton = [name for name, supported, _ in choices if supported]
    others = [f"{name} by {instead}" for name, supported, instead in choices if not supported]
    by_torch = ["attention in every row by torch SDPA (flash or cuDNN)", "DCT mixing by one matrix product of torch"]
    return [f"Triton for {', '.join(by_triton)}", *others, *by_torch]
