"""How many operations and kernels a layer launches on a GPU, counted without one."""

from __future__ import annotations

import json
import sys

import pytest
from support import WORKERS, run_command

pytest.importorskip("triton")

BOUNDS = {"plain": 42, "dropout": 55, "documents": 55}


def test_a_layer_launches_few_kernels():
    """Without static shapes a routed layer had 85 of them, and a dense one 41; with dropout they had 134 and 97."""
    done = run_command(sys.executable, WORKERS / "launches_worker.py", TRITON_INTERPRET="1", timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    counts = {case: {part: len(names) for part, names in parts.items()} for case, parts in found.items()}
    print("\n".join(f"{case}: {parts}" for case, parts in counts.items()))
    assert len(found) == 9
    for case, parts in counts.items():
        bound = 38 if case == "dense, plain" else BOUNDS[case.split(", ")[1]]
        assert parts["forward"] + parts["backward"] <= bound, found[case]
        assert parts["statistics"] <= 12 and parts.get("matrix", 0) <= 10, found[case]  # of all layers together
