"""Every router, norm and gate over tensor-parallel ranks, against the model on one rank, in float64.

What engines do with the shards is the matter of ``test_training_layouts.py``.
"""

from __future__ import annotations

import json

import pytest
from model_cases import VARIANTS
from support import WORKERS, run_ranks

WORKER = WORKERS / "model_shards_worker.py"
CASES = VARIANTS | {
    "baseline pre": {"kind": "baseline", "norm": "pre"},
    "pre": {"norm": "pre"},
    "pre, embedding multiplier": {"norm": "pre", "embedding_multiplier": 5.0},
    "pool batch": {"meta_router": {"pool": "batch"}},
    "pool none": {"meta_router": {"pool": "none"}},
    "published gate": {"meta_router": {"init": "published"}},
    "pre, soft three, pool batch": {"norm": "pre", "router": VARIANTS["soft three"]["router"]}
    | {"meta_router": {"pool": "batch"}},
}
LAYOUTS = {  # ranks, rows sharded, layers that are recomputed together
    "2 ranks": (2, False, None),
    "2 ranks, rows sharded": (2, True, None),
    "3 ranks, rows sharded, recomputed": (3, True, 2),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def measured(request, tmp_path_factory):
    """{case: {what: greatest deviation}} of a layout."""
    folder = tmp_path_factory.mktemp("shards")
    ranks, sequence, interval = LAYOUTS[request.param]
    described = {"cases": CASES, "sequence": sequence, "interval": interval}
    (folder / "layout.json").write_text(json.dumps(described))
    run_ranks(ranks, WORKER, folder, timeout=500)
    return json.loads((folder / "measured.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_shards_compute_what_the_whole_model_does(measured, case):
    deviations = measured[case]
    assert len(deviations) > 20  # loss, statistics and a gradient for each parameter
    wrong = {what: by for what, by in deviations.items() if not by <= 1e-11}
    assert not wrong
