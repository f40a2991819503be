"""Peak FLOP/s of GPUs by the name that their driver reports: the denominator of MFU.

The numbers are TFLOP/s of dense (not sparse) products of bf16 or fp16 summed in fp32, from the vendors' data sheets and
architecture papers. Where a data sheet gives only the number with sparsity, the table has half of it. GeForce cards sum
in fp32 at half the rate of fp16, which their papers list in a row of its own. A device of AMD's MI200 series is one of
the two dies of a module.

Only a name that is exactly in the table has a peak. A laptop's chip, a MIG slice or a cut-down export model shares most
of its name with a card that is several times as fast.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TERA = 1e12
PEAKS = {
    # NVIDIA data centre: the data sheet of each product. A name without PCIE or NVL is the SXM module.
    "V100": 125,
    "V100 PCIE": 112,
    "V100S PCIE": 130,
    "T4": 65,
    "A100": 312,
    "A100 PCIE": 312,
    "A800": 312,
    "A800 PCIE": 312,
    "A10": 125,
    "A10G": 70,
    "A30": 165,
    "A40": 149.7,
    "L4": 121,
    "L20": 119.5,
    "L40": 181.05,
    "L40S": 362.05,
    "H20": 148,
    "H100": 989.4,
    "H100 PCIE": 756,
    "H100 NVL": 835.5,
    "H800": 989.4,
    "H800 PCIE": 756,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    "B200": 2250,
    "GB200": 2500,
    "B300": 2250,
    "GB300": 2500,
    # NVIDIA workstation: the data sheets, and the papers of GA102, AD102 and RTX PRO Blackwell.
    "QUADRO RTX 6000": 130.5,
    "QUADRO RTX 8000": 130.5,
    "TITAN RTX": 130.5,
    "RTX A4000": 76.7,
    "RTX A4500": 94.6,
    "RTX A5000": 111.1,
    "RTX A5500": 136.4,
    "RTX A6000": 154.8,
    "RTX 5000 ADA": 261.1,
    "RTX 6000 ADA": 364.2,
    "RTX PRO 6000 BLACKWELL WORKSTATION EDITION": 503.8,
    # NVIDIA GeForce: the papers of TU102, GA102, AD102 and GB202, row "FP16 Tensor with FP32 accumulate".
    "RTX 2080 TI": 53.8,
    "RTX 3090": 71,
    "RTX 3090 TI": 80,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "RTX 5080": 112.6,
    "RTX 5090": 209.5,
    # AMD Instinct: the data sheet of each product.
    "MI210": 181,
    "MI250": 362.1 / 2,
    "MI250X": 383 / 2,
    "MI300A": 980.6,
    "MI300X": 1307.4,
    "MI325X": 1307.4,
    "MI350X": 2306.9,
    "MI355X": 2516.6,
}
# These words of a name do not identify the chip: maker, brand, module form, memory, cooling, virtual function.
_BESIDE_THE_CHIP = re.compile(r"NVIDIA|AMD|TESLA|GEFORCE|INSTINCT|GENERATION|SXM\d|OAM|\d+GB?|HBM\w*|AC|VF")


def peak_of(name: str) -> float | None:
    """Return the peak in FLOP/s of a GPU by what ``torch.cuda.get_device_name`` returns; None if it is unknown."""
    words = [word for word in re.split(r"[\s-]+", name.upper()) if not _BESIDE_THE_CHIP.fullmatch(word)]
    peak = PEAKS.get(" ".join(words))
    return peak * TERA if peak is not None else None


def _name_of(device: torch.device) -> str:
    import torch  # here, since a command's options need only the table

    return torch.cuda.get_device_name(device)


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a rank's device in FLOP/s; None if it is unknown, as on a CPU."""
    return peak_of(_name_of(device)) if device.type == "cuda" else None


def why_no_utilisation(device: torch.device) -> str | None:
    """Return why a run on ``device`` logs no MFU; None where it logs MFU, and on a CPU, where nobody expects it."""
    if device.type != "cuda" or peak_flops(device) is not None:
        return None
    name = _name_of(device)
    return f"no MFU: the peak of {name!r} is not known (megachiar/planning/peaks.py lists those that are)"
