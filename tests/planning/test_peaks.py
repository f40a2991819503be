"""The peak is known for the driver's name of every common GPU, and for no name that only resembles one."""

from __future__ import annotations

import pytest
import torch

from megachiar.planning.peaks import TERA, peak_flops, peak_of, why_no_utilisation

# Names as torch.cuda.get_device_name returns them, with dense TFLOP/s.
NAMES = {
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-SXM3-32GB": 125,
    "Tesla V100-PCIE-32GB": 112,
    "Tesla V100S-PCIE-32GB": 130,
    "Tesla T4": 65,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA A30": 165,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA H20": 148,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA GH200 144G HBM3e": 989.4,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA RTX A5000": 111.1,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "Quadro RTX 6000": 130.5,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "AMD Instinct MI250X": 191.5,
    "AMD Instinct MI300X": 1307.4,
    "AMD Instinct MI300X VF": 1307.4,
    "AMD Instinct MI325X": 1307.4,
}
NOT_THOSE = [
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA A100-SXM-64GB",  # a custom chip with more multiprocessors
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090X",
    "NVIDIA A1000",
    "NVIDIA",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_common_gpu_is_known_by_its_drivers_name(name):
    assert peak_of(name) == NAMES[name] * TERA


@pytest.mark.parametrize("name", NOT_THOSE)
def test_what_shares_a_part_of_the_name_is_not_taken_for_it(name):
    assert peak_of(name) is None


def test_a_gpu_without_a_known_peak_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X9000")
    assert peak_flops(torch.device("cuda", 0)) is None
    assert "no MFU: the peak of 'NVIDIA X9000' is not known" in why_no_utilisation(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak_flops(torch.device("cuda", 0)) == 121 * TERA and why_no_utilisation(torch.device("cuda", 0)) is None
    assert why_no_utilisation(torch.device("cpu")) is None
