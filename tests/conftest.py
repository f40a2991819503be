"""Run the longest test files first: where several workers share the files, these must not be left for the end."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
LONGEST = (
    "engine/test_layouts.py",
    "kernels/test_triton.py",
    "test_readme.py",
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


def pytest_collection_modifyitems(items: list) -> None:
    order = {TESTS / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(LONGEST)))
