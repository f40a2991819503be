"""Options of the tests; and the longest files run first, since where workers share them these must not come last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
LONGEST = (
    "test_readme.py",
    "engine/test_layouts.py",
    "kernels/test_triton.py",
    "model/test_training.py",
    "sweeps/test_sweep.py",
    "training/test_tasks.py",
    "engine/test_tasks.py",
    "interop/test_published_runs.py",
    "training/test_final_result.py",
    "checkpoint/test_resume.py",
    "checkpoint/test_other_layouts.py",
    "cli/test_benchmarks.py",
    "model/test_shards.py",
    "data/preprocessing/test_preprocess_resume.py",
    "test_launch.py",
    "planning/test_rank_plan.py",
    "training/test_watch.py",
    "training/test_bad_input.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-kills", type=int, default=50, help="kills of the slow test_soak.py, over all its layouts")
    parser.addoption("--published-code", type=Path, help="folder CHIAR-former of the published code, to compare with")
    parser.addoption("--soak-seed", type=int, default=None, help="seed of its moments and victims, to repeat them")


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores out among the workers: threads that wait for one another's cores take several times as long."""
    if workers := getattr(config, "workerinput", None):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers["workercount"]))


def pytest_collection_modifyitems(items: list) -> None:
    order = {TESTS / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(LONGEST)))
