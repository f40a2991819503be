"""The host waits for the device once in a step, where the step is decided on, and once in an evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from labelled import write_examples
from support import WORKERS, run_ranks, small_config, write_config, write_tokens

from megachiar.engine.confusion import confusion_matrix
from megachiar.engine.host_copies import NumberReader, to_device

STEPS = 3
ONCE = {"megachiar/engine/host_copies.py:read": 1}
OF_DEEPSPEED = {
    "ZeRO 0": set(),
    "ZeRO 1": {"is_invalid_grad_norm"},
    "ZeRO 1, bf16": {"is_invalid_grad_norm", "clip_tensors_by_global_norm"},
    "ZeRO 1, fp16": {"is_invalid_grad_norm", "has_overflow"},
    "ZeRO 2": {"is_invalid_grad_norm"},
    "ZeRO 3": {
        "is_invalid_grad_norm",
        "assert_lst_len_same_as_other_ranks",  # where a step runs other modules than the last one
        "get_lst_from_rank0",
        "<listcomp>",
    },
}
"""Functions of DeepSpeed that read besides, as docs/profiling.md says."""


def test_the_host_reads_once_a_step_and_once_an_evaluation(tmp_path):
    """In a run that has all that is measured: a learned router, classification and another text beside the main one."""
    for name, documents in (("train", 24), ("valid", 4), ("other", 8)):
        write_tokens(tmp_path / name, documents=documents)
    write_examples(tmp_path / "examples")
    write_examples(tmp_path / "held_out", 21, seed=1)
    labelled = {"kind": "classification", "data": str(tmp_path / "examples"), "validation": str(tmp_path / "held_out")}
    tasks = {
        "strides": {**labelled, "global_batch_size": 8, "classes": 3},
        "other": {"kind": "language_model", "data": str(tmp_path / "other"), "global_batch_size": 8},
    }
    config = small_config(
        tmp_path,
        model={"router": {"kind": "learned", "target_share": 0.4, "explore": 0.3}},
        mixed={"probability": 1.0, "group_size": 8, "tasks": tasks},
        training={"steps": STEPS},
    )
    wanted = {name: [f"parallel.zero_stage={name[5]}"] for name in OF_DEEPSPEED}
    for precision in ("bf16", "fp16"):
        wanted[f"ZeRO 1, {precision}"].append(f"precision.compute={precision}")
    path = write_config(tmp_path / "config.yaml", config)
    (output,) = run_ranks(1, WORKERS / "host_reads_worker.py", path, json.dumps(wanted))
    (found,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert set(found) == set(wanted)
    for name, (steps, evaluations) in found.items():
        assert [of_ours(step) for step in steps] == [ONCE] * STEPS, name
        assert [sum(of_ours(each).values()) for each in evaluations] == [1, 1], name
    for name, (steps, _) in found.items():
        of_deepspeed = {place.rpartition(":")[2] for place in steps[-1]} - {"read"}
        assert of_deepspeed <= OF_DEEPSPEED[name], name


def of_ours(reads: dict[str, int]) -> dict[str, int]:
    """Return the reads of this package, without DeepSpeed's."""
    return {place: count for place, count in reads.items() if place.startswith("megachiar/")}


def test_an_array_goes_to_the_device_and_numbers_come_back():
    array, cpu = np.arange(6).reshape(2, 3), torch.device("cpu")
    assert to_device(array, cpu).tolist() == array.tolist()
    assert NumberReader(cpu).read(torch.tensor([0.1, 2.0], dtype=torch.float64)) == [0.1, 2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_array_goes_to_a_gpu_and_numbers_come_back():
    device = torch.device("cuda")
    array = np.arange(2**20).reshape(2, -1)
    reader = NumberReader(device)
    for _ in range(3):
        on_device = to_device(array, device)
        sums = on_device.double().sum(1)
        assert reader.read(sums) == array.sum(1).tolist()
    assert reader.read(sums[:1]) == [array[0].sum()]


def test_confusion_counts_labelled_sequences():
    labels, predicted = torch.tensor([0, 2, 2, -100, 1]), torch.tensor([0, 1, 2, 2, 1])
    assert confusion_matrix(labels, predicted, 3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
