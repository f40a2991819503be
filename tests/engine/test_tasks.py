"""Classification and mixed training have the losses of one process in every layout.

``pytest tests/engine/test_tasks.py -s`` prints the table that ``docs/correctness.md`` shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from labelled import write_examples
from support import WORKERS, run_ranks, small_config, write_config, write_tokens

WORKER = WORKERS / "tasks_worker.py"
TP, PP, SP, ZERO = "parallel.tensor_size=", "parallel.pipeline_size=", "parallel.sequence=true", "parallel.zero_stage="
RECOMPUTE, MICRO = "training.activation_checkpoint_interval=", "training.micro_batch_size="
SINGLE = "1 process"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    SINGLE: (1, [ZERO + "0"]),
    "1 process, ZeRO 1, micro-batch 4": (1, [MICRO + "4"]),
    "tp 2": (2, [TP + "2"]),
    "tp 2, sequence": (2, [TP + "2", SP]),
    "pp 2": (2, [PP + "2"]),
    "pp 2, recompute 1, micro-batch 4": (2, [PP + "2", RECOMPUTE + "1", MICRO + "4"]),
    "dp 2, ZeRO 0": (2, [ZERO + "0"]),
    "dp 2, ZeRO 1, micro-batch 4": (2, [MICRO + "4"]),
    "dp 2, ZeRO 2": (2, [ZERO + "2"]),
    "dp 2, ZeRO 3": (2, [ZERO + "3"]),
    "tp 2, pp 2, sequence": (4, [TP + "2", PP + "2", SP]),
    "tp 2, dp 2, ZeRO 3": (4, [TP + "2", ZERO + "3"]),
}
SLOW = {"tp 2", "dp 2, ZeRO 0", "dp 2, ZeRO 1, micro-batch 4", "tp 2, pp 2, sequence", "tp 2, dp 2, ZeRO 3"}
TASKS = ("classification", "mixed")
CASES = [
    pytest.param(task, name, marks=[pytest.mark.slow] if name in SLOW else [], id=f"{task}-{name}")
    for task in TASKS
    for name in LAYOUTS
    if name != SINGLE
]
LEARNED = {"kind": "learned", "target_share": 0.4, "explore": 0.3}
CASES += [
    ("classification, learned", "tp 2, sequence"),
    ("classification, learned", "pp 2, recompute 1, micro-batch 4"),
    ("mixed, learned", "tp 2, sequence"),
    ("mixed, learned", "pp 2, recompute 1, micro-batch 4"),
    ("mixed, learned", "dp 2, ZeRO 2"),
]


def config_of(task: str, folder: Path) -> dict:
    """Return the config of a run that learns a classification, or a language model and two other tasks."""
    router = LEARNED if "learned" in task else {"kind": "random", "attention_share": 0.5}  # no rounding changes a coin
    model = {"dropout": 0.1, "num_attention_heads": 4, "router": router}
    training = {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "threads": 1}
    if task.startswith("classification"):
        data = {
            "train": [{"path": str(folder / "examples")}],
            "validation": {"valid": str(folder / "held_out")},
        }
        task_section = {"kind": "classification", "classes": 3, "head": "mlp"}
        return small_config(folder, model=model, training=training, data=data, task=task_section)
    tasks = {
        "strides": {
            "kind": "classification",
            "data": str(folder / "examples"),
            "validation": str(folder / "held_out"),
            "global_batch_size": 8,
            "classes": 3,
            "weight": 2.0,
        },
        "other": {"kind": "language_model", "data": str(folder / "other"), "global_batch_size": 8, "loss_weight": 0.5},
    }
    mixed = {"probability": 0.5, "group_size": 4, "tasks": tasks}
    return small_config(folder, model=model, training=training, mixed=mixed)


class Runs:
    """The recorded runs of one task, trained together by the same processes."""

    def __init__(self, folder: Path, task: str, names: set[str]):
        write_tokens(folder / "train")
        write_tokens(folder / "valid", seed=1, documents=4)
        write_tokens(folder / "other", seed=2, documents=8)
        write_examples(folder / "examples")
        write_examples(folder / "held_out", 21, seed=1)
        self.config = write_config(folder / "config.yaml", config_of(task, folder))
        self.recordings: dict[str, dict[str, np.ndarray]] = {}
        for ranks in (1, 2, 4):
            layouts = {name: sets for name, (n, sets) in LAYOUTS.items() if n == ranks and name in names | {SINGLE}}
            if layouts:
                run_ranks(ranks, WORKER, self.config, folder, json.dumps(layouts), timeout=570)
            self.recordings |= {name: dict(np.load(folder / f"{name}.npz")) for name in layouts}


@pytest.fixture(scope="module")
def runs_of(request, tmp_path_factory):
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    selected = [item.callspec.params for item in items]
    made: dict[str, Runs] = {}

    def of_task(task: str) -> Runs:
        if task not in made:
            names = {params["name"] for params in selected if params.get("task") == task and "name" in params}
            made[task] = Runs(tmp_path_factory.mktemp(task), task, names)
        return made[task]

    return of_task


def deviation(one: np.ndarray, other: np.ndarray) -> float:
    """Return the greatest relative difference; a step without a task is nan in both."""
    np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
    return float(np.nanmax(np.abs(other / one - 1), initial=0.0))


@pytest.mark.parametrize(("task", "name"), CASES)
def test_losses_do_not_depend_on_the_layout(runs_of, task, name):
    recordings = runs_of(task).recordings
    single, other = recordings[SINGLE], recordings[name]
    losses = [key for key in single if key.endswith("loss")]
    of_losses = max(deviation(single[key], other[key]) for key in losses)
    norm = deviation(single["gradient_norm"], other["gradient_norm"])
    parameters = max(
        float(np.abs(other[key] - value).max()) for key, value in single.items() if key.startswith("parameter ")
    )
    print(f"| {task} | {name} | {of_losses:.1e} | {norm:.1e} | {parameters:.1e} |")
    assert {*single} == {*other}
    assert of_losses <= 2e-6
    assert norm <= 5e-6
    assert parameters <= 2e-4  # AdamW divides a gradient by its own size: one that vanishes moves by rounding
    np.testing.assert_allclose(other["attention_share"], single["attention_share"], atol=1e-6)
    np.testing.assert_allclose(other["entropy"], single["entropy"], rtol=1e-5)
    np.testing.assert_allclose(other["gate"], single["gate"], rtol=1e-5)
    for key in single:
        if key.startswith("evaluation "):
            np.testing.assert_allclose(other[key], single[key], rtol=2e-6)


def test_a_mixed_run_has_batches_of_its_tasks_in_some_steps(runs_of):
    single = runs_of("mixed").recordings[SINGLE]
    assert np.isfinite(single["strides loss"]).any()
    assert np.isfinite(single["other loss"]).any()
    assert np.isnan(single["other loss"]).any(), "every step had a batch of every task: the draws prove nothing"
    assert np.nanmin(single["strides gate"]) > 0
