"""The GPUs that the planner knows: what their data sheets promise, and what training reaches of it.

Two numbers of each generation are no data sheet's: the shares of the peak that large matrix products and attention
reach while a whole model trains. Some published runs set them, and others are held against them (docs/planning.md).
``peaks`` has the peaks, by the names of the drivers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megachiar.planning.peaks import PEAKS, TERA

GIGA = 1e9
REACHED = 0.8
"""Share that is reached of a data sheet's bandwidths, of memory and of links, and of its fp32 without tensor cores."""


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links. All rates are those that training reaches, but for the peak.

    Attributes:
        peak: FLOP/s of dense 16-bit products by the data sheet; None where it is not known, which leaves MFU out.
        products: FLOP/s of large 16-bit matrix products.
        attention: FLOP/s of attention's products in a fused kernel.
        tf32: FLOP/s of large fp32 products whose operands are rounded to TF32.
        fp32: FLOP/s of large fp32 products.
        memory_bandwidth: bytes/s.
        node_bandwidth: bytes/s that it sends to the GPUs of its node.
        network_bandwidth: bytes/s that it sends to other nodes.
    """

    peak: float | None
    products: float
    attention: float
    tf32: float
    fp32: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


def _gpu(
    *,
    peak: float,
    products: float,
    attention: float,
    fp32: float,
    memory_bandwidth: float,
    link: float,
    network: float,
) -> Gpu:
    """Return a GPU from its data sheet in TFLOP/s and GB/s, and the two shares of the peak that it reaches."""
    return Gpu(
        peak=peak * TERA,
        products=products * peak * TERA,
        attention=attention * peak * TERA,
        tf32=products * peak / 2 * TERA,
        fp32=REACHED * fp32 * TERA,
        memory_bandwidth=REACHED * memory_bandwidth * GIGA,
        node_bandwidth=REACHED * link * GIGA,
        network_bandwidth=REACHED * network * GIGA,
    )


def _a100(memory_bandwidth: float) -> Gpu:
    return _gpu(
        peak=PEAKS["A100"],
        products=0.78,
        attention=0.44,
        fp32=19.5,
        memory_bandwidth=memory_bandwidth,
        link=300,
        network=25,
    )


def _hopper(memory_bandwidth: float) -> Gpu:
    return _gpu(
        peak=PEAKS["H100"],
        products=0.62,
        attention=0.26,
        fp32=67,
        memory_bandwidth=memory_bandwidth,
        link=450,
        network=50,
    )


GPUS = {"a100": _a100(2039), "a100-40gb": _a100(1555), "h100": _hopper(3350), "h200": _hopper(4800)}
"""SXM modules with NVLink, and a network card of 200 (A100) or 400 Gbit/s for each GPU."""
