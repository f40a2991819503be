"""The losses of a run do not depend on its layout. ``docs/correctness.md`` shows the table that this file prints.

``pytest tests/engine/test_layouts.py -m "slow or not slow" -s`` prints the table.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from support import WORKERS, run_ranks, small_config, write_config, write_tokens

STEPS = 20
TOGETHER = 16
"""The most layouts that the same processes train: all of two ranks take longer than a test may on a busy machine."""
WORKER = WORKERS / "layouts_worker.py"
TP, PP, SP, ZERO = "parallel.tensor_size=", "parallel.pipeline_size=", "parallel.sequence=true", "parallel.zero_stage="
RECOMPUTE, MICRO = "training.activation_checkpoint_interval=", "training.micro_batch_size="
OFFLOAD, REGULARISED = "parallel.offload_optimizer=true", "model.router.collapse_weight=0.05"
DOCUMENTS = ["data.document_mask=true", "data.document_end=5"]
SCALED = ["model.embedding_multiplier=50", "model.norm=pre"]
RANDOM = ["model.router.kind=random", "model.router.tau=null", "model.router.attention_share=0.4"]
HASHED = ["model.router.kind=hashed", "model.router.seed=3"]
LEARNED = ["model.router.kind=learned", "model.router.tau=null", "model.router.target_share=0.4"]
LEARNED += ["model.router.explore=0.3"]
HELD = ["model.router.target_share=0.3", "model.router.anneal_steps=12"]
SOFT = ["model.router.kind=soft", "model.router.tau=null"]
HARD = ["model.router.kind=hard", "model.router.tau=null"]
THREE = ["model.router.operators=[dct, rbf, attention]", "model.router.tau=null"]
THREE += ["model.router.tau_low=0.785", "model.router.tau_high=0.795"]
ROUTED_KEYS = ["model.attention.keys=routed"]
MUON = ["optimizer.kind=muon"]
MUON_IN_BF16 = [*MUON, "optimizer.muon.ns_dtype=bf16"]
STATIC, GRAPHS = "training.static_shapes=true", "training.cuda_graphs="
ALL_AT_ONCE = [*HASHED, *HELD, *DOCUMENTS, *ROUTED_KEYS]
BF16, FP16 = "precision.compute=bf16", "precision.compute=fp16"

# name: (ranks, overrides). The single process accumulates 4 micro-batches of 2 sequences; the replicas of a layout
# divide the same batch.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 process, micro-batch 8": (1, [MICRO + "8"]),
    "1 process, recompute 2": (1, [RECOMPUTE + "2"]),
    "tp 2, micro-batch 4": (2, [TP + "2", MICRO + "4"]),
    "tp 2, sequence": (2, [TP + "2", SP]),
    "pp 2": (2, [PP + "2"]),
    "pp 2, recompute 1": (2, [PP + "2", RECOMPUTE + "1"]),
    "dp 2, ZeRO 0": (2, [ZERO + "0"]),
    "dp 2, ZeRO 1, micro-batch 4": (2, [MICRO + "4"]),
    "dp 2, ZeRO 2": (2, [ZERO + "2"]),
    "dp 2, ZeRO 3": (2, [ZERO + "3"]),
    "dp 2, ZeRO 2, offload, micro-batch 4": (2, [ZERO + "2", OFFLOAD, MICRO + "4"]),
    "pp 2, offload, micro-batch 4": (2, [PP + "2", OFFLOAD, MICRO + "4"]),
    "tp 4, micro-batch 8": (4, [TP + "4", MICRO + "8"]),
    "tp 4, sequence, micro-batch 8": (4, [TP + "4", SP, MICRO + "8"]),
    "pp 4": (4, [PP + "4"]),
    "tp 2, pp 2, micro-batch 4": (4, [TP + "2", PP + "2", MICRO + "4"]),
    "tp 2, pp 2, sequence, micro-batch 4": (4, [TP + "2", PP + "2", SP, MICRO + "4"]),
    "tp 2, dp 2": (4, [TP + "2"]),
    "tp 2, dp 2, sequence, recompute 1, micro-batch 4": (4, [TP + "2", SP, RECOMPUTE + "1", MICRO + "4"]),
    "tp 2, dp 2, ZeRO 3, micro-batch 4": (4, [TP + "2", ZERO + "3", MICRO + "4"]),
    "pp 2, dp 2": (4, [PP + "2"]),
    "dp 4, ZeRO 2, micro-batch 1": (4, [ZERO + "2", MICRO + "1"]),
    "tp 2, pp 2, dp 2, sequence": (8, [TP + "2", PP + "2", SP]),
}
# The regulariser depends on how the batch is cut into micro-batches: these layouts have those of the single process.
REGULARISED_LAYOUTS = {
    "regularised: pp 2, recompute 2": (2, [REGULARISED, PP + "2", RECOMPUTE + "2"]),
    "regularised: dp 2, ZeRO 2": (2, [REGULARISED, ZERO + "2"]),
    "regularised: tp 2, pp 2, sequence": (4, [REGULARISED, TP + "2", PP + "2", SP]),
}
DOCUMENT_LAYOUTS = {
    "documents: pp 2, recompute 2": (2, [*DOCUMENTS, PP + "2", RECOMPUTE + "2"]),
    "documents: dp 2, ZeRO 2": (2, [*DOCUMENTS, ZERO + "2"]),
    "documents: tp 2, pp 2, sequence": (4, [*DOCUMENTS, TP + "2", PP + "2", SP]),
}
SCALED_LAYOUTS = {
    "scaled embedding: tp 2, sequence": (2, [*SCALED, TP + "2", SP]),
    "scaled embedding: pp 2": (2, [*SCALED, PP + "2"]),
    "scaled embedding: dp 2, ZeRO 3": (2, [*SCALED, ZERO + "3"]),
}
# The controls. A coin is a function of numbers that every rank must know: of the sample, or of its documents.
CONTROL_LAYOUTS = {
    "random: tp 2, sequence, recompute 1": (2, [*RANDOM, TP + "2", SP, RECOMPUTE + "1"]),
    "random: pp 2, recompute 1": (2, [*RANDOM, PP + "2", RECOMPUTE + "1"]),
    "random: dp 2, ZeRO 3": (2, [*RANDOM, ZERO + "3"]),
    "random: tp 2, pp 2, sequence, micro-batch 4": (4, [*RANDOM, TP + "2", PP + "2", SP, MICRO + "4"]),
    "random, documents: dp 2, ZeRO 2": (2, [*RANDOM, *DOCUMENTS, ZERO + "2"]),
    "random, documents: tp 2, pp 2, sequence": (4, [*RANDOM, *DOCUMENTS, TP + "2", PP + "2", SP]),
    "hashed: tp 2, sequence, recompute 1": (2, [*HASHED, TP + "2", SP, RECOMPUTE + "1"]),
    "hashed: dp 2, ZeRO 2": (2, [*HASHED, ZERO + "2"]),
    "hashed: tp 2, pp 2, sequence": (4, [*HASHED, TP + "2", PP + "2", SP]),
}
# Thresholds that follow the share of attention, and heads that measure what attention is worth.
RUNNING_LAYOUTS = {
    "learned: 1 process, micro-batch 8, recompute 2": (1, [*LEARNED, MICRO + "8", RECOMPUTE + "2"]),
    "learned: tp 2, sequence, recompute 1": (2, [*LEARNED, TP + "2", SP, RECOMPUTE + "1"]),
    "learned: tp 2": (2, [*LEARNED, TP + "2"]),
    "learned: pp 2, recompute 1": (2, [*LEARNED, PP + "2", RECOMPUTE + "1"]),
    "learned: dp 2, ZeRO 0": (2, [*LEARNED, ZERO + "0"]),
    "learned: dp 2, ZeRO 3": (2, [*LEARNED, ZERO + "3"]),
    "learned: tp 2, pp 2, sequence, micro-batch 4": (4, [*LEARNED, TP + "2", PP + "2", SP, MICRO + "4"]),
    "learned, documents: dp 2, ZeRO 2": (2, [*LEARNED, *DOCUMENTS, ZERO + "2"]),
    "held share: pp 2": (2, [*HELD, PP + "2"]),
    "held share: dp 2, ZeRO 2": (2, [*HELD, ZERO + "2"]),
}
# Gates, of which every token gets a gradient, and three operators.
GATE_LAYOUTS = {
    f"{kind}: {name}": (ranks, [*router, *sets])
    for kind, router in (("soft", SOFT), ("hard", HARD), ("three operators", THREE))
    for name, (ranks, sets) in {
        "tp 2, sequence": (2, [TP + "2", SP]),
        "pp 2, recompute 1": (2, [PP + "2", RECOMPUTE + "1"]),
        "dp 2, ZeRO 2": (2, [ZERO + "2"]),
    }.items()
}
# Muon needs whole matrices, which tensor parallelism and ZeRO cut each in its own way.
MUON_LAYOUTS = {
    "muon: 1 process, micro-batch 8": (1, [*MUON, MICRO + "8"]),
    "muon: tp 2, sequence": (2, [*MUON, TP + "2", SP]),
    "muon: pp 2, recompute 1": (2, [*MUON, PP + "2", RECOMPUTE + "1"]),
    "muon: dp 2, ZeRO 0": (2, [*MUON, ZERO + "0"]),
    "muon: dp 2, ZeRO 1, micro-batch 4": (2, [*MUON, MICRO + "4"]),
    "muon: dp 2, ZeRO 2": (2, [*MUON, ZERO + "2"]),
    "muon: tp 2, dp 2": (4, [*MUON, TP + "2"]),
    "muon: tp 2, pp 2, sequence, micro-batch 4": (4, [*MUON, TP + "2", PP + "2", SP, MICRO + "4"]),
    "muon: dp 4, ZeRO 2, micro-batch 1": (4, [*MUON, ZERO + "2", MICRO + "1"]),
}
# Routed layers of static shapes, against one process whose shapes follow the routes.
STATIC_LAYOUTS = {
    "1 process, static, micro-batch 8": (1, [STATIC, MICRO + "8"]),
    "1 process, static, recompute 2": (1, [STATIC, RECOMPUTE + "2"]),
    "dp 2, ZeRO 0, static": (2, [STATIC, ZERO + "0"]),
    "dp 2, ZeRO 1, static, micro-batch 4": (2, [STATIC, MICRO + "4"]),
    "dp 2, ZeRO 2, offload, static, micro-batch 4": (2, [STATIC, ZERO + "2", OFFLOAD, MICRO + "4"]),
    "pp 2, static": (2, [STATIC, PP + "2"]),
    "pp 2, recompute 1, static": (2, [STATIC, PP + "2", RECOMPUTE + "1"]),
    "pp 2, dp 2, static": (4, [STATIC, PP + "2"]),
    "regularised: pp 2, recompute 2, static": (2, [STATIC, REGULARISED, PP + "2", RECOMPUTE + "2"]),
    "documents: pp 2, recompute 2, static": (2, [STATIC, *DOCUMENTS, PP + "2", RECOMPUTE + "2"]),
    "documents: dp 2, ZeRO 2, static": (2, [STATIC, *DOCUMENTS, ZERO + "2"]),
    "scaled embedding: pp 2, static": (2, [STATIC, *SCALED, PP + "2"]),
    "random: pp 2, recompute 1, static": (2, [STATIC, *RANDOM, PP + "2", RECOMPUTE + "1"]),
    "random, documents: dp 2, ZeRO 2, static": (2, [STATIC, *RANDOM, *DOCUMENTS, ZERO + "2"]),
    "hashed: dp 2, ZeRO 2, static": (2, [STATIC, *HASHED, ZERO + "2"]),
    "held share: dp 2, ZeRO 2, static": (2, [STATIC, *HELD, ZERO + "2"]),
    "muon: dp 2, ZeRO 1, static, micro-batch 4": (2, [STATIC, *MUON, MICRO + "4"]),
    "routed keys: tp 2, pp 2, sequence": (4, [*ROUTED_KEYS, TP + "2", PP + "2", SP]),
    "routed keys: pp 2, recompute 1, static": (2, [STATIC, *ROUTED_KEYS, PP + "2", RECOMPUTE + "1"]),
    "all at once: 1 process, static, micro-batch 8": (1, [STATIC, *ALL_AT_ONCE, MICRO + "8"]),
    "all at once: pp 2, dp 2, recompute 1, static": (4, [STATIC, *ALL_AT_ONCE, PP + "2", RECOMPUTE + "1"]),
}
# Layers that are recorded and repeated, as CUDA graphs would.
CAPTURED_LAYOUTS = {
    "1 process, graphs of 2, micro-batch 8": (1, [GRAPHS + "2", MICRO + "8"]),
    "dp 2, ZeRO 0, graphs of 8": (2, [GRAPHS + "8", ZERO + "0"]),
    "dp 2, ZeRO 1, graphs of 1, micro-batch 4": (2, [GRAPHS + "1", MICRO + "4"]),
    "documents: dp 2, ZeRO 2, graphs of 2": (2, [GRAPHS + "2", *DOCUMENTS, ZERO + "2"]),
    "regularised: dp 2, ZeRO 2, graphs of 2": (2, [GRAPHS + "2", REGULARISED, ZERO + "2"]),
    "held share: dp 2, ZeRO 2, graphs of 2": (2, [GRAPHS + "2", *HELD, ZERO + "2"]),
    "muon: dp 2, ZeRO 2, graphs of 2": (2, [GRAPHS + "2", *MUON, ZERO + "2"]),
    "all at once: dp 4, ZeRO 2, graphs of 2": (4, [GRAPHS + "2", *ALL_AT_ONCE, ZERO + "2"]),
}
EXACT_LAYOUTS = LAYOUTS | REGULARISED_LAYOUTS | DOCUMENT_LAYOUTS | SCALED_LAYOUTS | CONTROL_LAYOUTS | RUNNING_LAYOUTS
EXACT_LAYOUTS |= GATE_LAYOUTS | MUON_LAYOUTS | STATIC_LAYOUTS | CAPTURED_LAYOUTS
# Compared with one process of the same precision: the routes of tokens near tau differ, and the losses with them.
# Muon's iterations in bf16 round otherwise where the last bits of gradients differ.
HALF_LAYOUTS = {
    "bf16: tp 2, sequence, micro-batch 4": (2, [BF16, TP + "2", SP, MICRO + "4"]),
    "bf16: pp 2": (2, [BF16, PP + "2"]),
    "bf16: pp 2, bf16 gradients": (2, [BF16, PP + "2", "precision.gradient_accumulation=bf16"]),
    "bf16: pp 2, offload, micro-batch 4": (2, [BF16, PP + "2", OFFLOAD, MICRO + "4"]),
    "bf16: dp 2, ZeRO 2": (2, [BF16, ZERO + "2"]),
    "bf16: dp 2, ZeRO 3, offload, micro-batch 4": (2, [BF16, ZERO + "3", OFFLOAD, MICRO + "4"]),
    "bf16: tp 2, pp 2, micro-batch 4": (4, [BF16, TP + "2", PP + "2", MICRO + "4"]),
    "fp16, regularised: tp 2, sequence": (2, [FP16, REGULARISED, TP + "2", SP]),
    "bf16: dp 2, ZeRO 2, static": (2, [STATIC, BF16, ZERO + "2"]),
    "bf16: dp 2, ZeRO 1, graphs of 2, micro-batch 4": (2, [GRAPHS + "2", BF16, MICRO + "4"]),
    "fp16, regularised: pp 2, static": (2, [STATIC, FP16, REGULARISED, PP + "2"]),
    "muon, bf16: tp 2, dp 2": (4, [*MUON, BF16, TP + "2"]),
    "muon, bf16: pp 2, bf16 gradients": (2, [*MUON, BF16, PP + "2", "precision.gradient_accumulation=bf16"]),
    "muon in bf16: tp 2, sequence": (2, [*MUON_IN_BF16, TP + "2", SP]),
    "muon in bf16: dp 2, ZeRO 1, micro-batch 4": (2, [*MUON_IN_BF16, MICRO + "4"]),
    "muon, fp16: dp 2, ZeRO 2": (2, [*MUON, FP16, ZERO + "2"]),
    "fp16, regularised: pp 2": (2, [FP16, REGULARISED, PP + "2"]),
}
# Trained with CHIAR layers only, to save time: what these layouts add to the others does not depend on the layers.
CHIAR_ONLY = {
    "1 process, recompute 2",
    "dp 2, ZeRO 0",
    "dp 2, ZeRO 2, offload, micro-batch 4",
    "pp 2, offload, micro-batch 4",
    "tp 2, dp 2, sequence, recompute 1, micro-batch 4",
    "tp 2, dp 2, ZeRO 3, micro-batch 4",
    "dp 4, ZeRO 2, micro-batch 1",
    "bf16: pp 2, bf16 gradients",
    "bf16: pp 2, offload, micro-batch 4",
    "bf16: dp 2, ZeRO 3, offload, micro-batch 4",
    *REGULARISED_LAYOUTS,
    *SCALED_LAYOUTS,
    *CONTROL_LAYOUTS,
    *RUNNING_LAYOUTS,
    *GATE_LAYOUTS,
    *MUON_LAYOUTS,
    *STATIC_LAYOUTS,
    *CAPTURED_LAYOUTS,
    "bf16: dp 2, ZeRO 2, static",
    "bf16: dp 2, ZeRO 1, graphs of 2, micro-batch 4",
    "documents: dp 2, ZeRO 2",
    *(name for name in HALF_LAYOUTS if "regularised" in name or "muon" in name),
}
# The fast tests: each way to divide the work, each ZeRO stage and precision, offload, recomputation, the regulariser,
# documents, static shapes and captured layers, each alone or with what interacts with it. The others are slow tests.
FAST = {
    "1 process, micro-batch 8",
    "1 process, recompute 2",
    "tp 2, sequence",
    "pp 2, recompute 1",
    "dp 2, ZeRO 1, micro-batch 4",
    "dp 2, ZeRO 2, offload, micro-batch 4",
    "dp 2, ZeRO 3",
    "pp 2, offload, micro-batch 4",
    "tp 2, pp 2, sequence, micro-batch 4",
    "tp 2, dp 2, ZeRO 3, micro-batch 4",
    "pp 2, dp 2",
    "regularised: dp 2, ZeRO 2",
    "documents: pp 2, recompute 2",
    "documents: tp 2, pp 2, sequence",
    "scaled embedding: tp 2, sequence",
    "scaled embedding: pp 2",
    "random: pp 2, recompute 1",
    "random: tp 2, pp 2, sequence, micro-batch 4",
    "random, documents: tp 2, pp 2, sequence",
    "hashed: dp 2, ZeRO 2",
    "hashed: tp 2, pp 2, sequence",
    "learned: pp 2, recompute 1",
    "learned: dp 2, ZeRO 3",
    "learned: tp 2, pp 2, sequence, micro-batch 4",
    "held share: dp 2, ZeRO 2",
    "soft: tp 2, sequence",
    "hard: pp 2, recompute 1",
    "muon: dp 2, ZeRO 1, micro-batch 4",
    "muon: tp 2, sequence",
    "muon: tp 2, dp 2",
    "muon, bf16: pp 2, bf16 gradients",
    "hashed: dp 2, ZeRO 2, static",
    "documents: pp 2, recompute 2, static",
    "all at once: 1 process, static, micro-batch 8",
    "held share: dp 2, ZeRO 2, graphs of 2",
    "bf16: tp 2, sequence, micro-batch 4",
    "bf16: pp 2, bf16 gradients",
    "bf16: dp 2, ZeRO 3, offload, micro-batch 4",
    "fp16, regularised: pp 2",
}
# The fast tests of the baseline, whose layers are those of CHIAR without a router: stages, and one run in 16 bits.
# tests/model/test_shards.py tests what a tensor-parallel group does with its layers.
FAST_BASELINE = {"pp 2, recompute 1", "bf16: dp 2, ZeRO 2"}
SINGLE = "1 process"
# The runs of one process that the other runs are compared with.
REFERENCES = {
    SINGLE: [ZERO + "0"],
    f"regularised: {SINGLE}": [REGULARISED],
    f"documents: {SINGLE}": DOCUMENTS,
    f"scaled embedding: {SINGLE}": SCALED,
    f"random: {SINGLE}": RANDOM,
    f"random, documents: {SINGLE}": [*RANDOM, *DOCUMENTS],
    f"hashed: {SINGLE}": HASHED,
    f"learned: {SINGLE}": LEARNED,
    f"learned, documents: {SINGLE}": [*LEARNED, *DOCUMENTS],
    f"held share: {SINGLE}": HELD,
    f"soft: {SINGLE}": SOFT,
    f"hard: {SINGLE}": HARD,
    f"three operators: {SINGLE}": THREE,
    f"routed keys: {SINGLE}": ROUTED_KEYS,
    f"all at once: {SINGLE}": ALL_AT_ONCE,
    f"muon: {SINGLE}": MUON,
    f"muon, bf16: {SINGLE}": [*MUON, BF16],
    f"muon, fp16: {SINGLE}": [*MUON, FP16],
    f"muon in bf16: {SINGLE}": MUON_IN_BF16,
    f"bf16: {SINGLE}": [BF16],
    f"fp16, regularised: {SINGLE}": [FP16, REGULARISED],
}


def for_layouts(layouts: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise a test by kind of model and by layout."""
    fast = {"chiar": FAST, "baseline": FAST_BASELINE}
    cases = [(kind, name) for kind in fast for name in layouts if kind == "chiar" or name not in CHIAR_ONLY]
    marked = [pytest.param(k, n, marks=[] if n in fast[k] else pytest.mark.slow, id=f"{k}-{n}") for k, n in cases]
    return pytest.mark.parametrize(("runs", "name"), marked, indirect=["runs"])


def reference_of(name: str) -> str:
    """Return the name of the run of one process that a layout is compared with."""
    kind, colon, _ = name.partition(": ")
    return f"{kind}: {SINGLE}" if colon else SINGLE


class Runs:
    """The recorded runs of one kind of model, each trained when a test first needs it.

    Layouts with the same number of ranks are trained together by the same processes, ``TOGETHER`` at a time.

    Args:
        folder: where datasets, config and recordings are written.
        kind: ``model.kind``, chiar or baseline.
        names: the layouts that tests of this session need.
    """

    def __init__(self, folder: Path, kind: str, names: set[str]):
        self.folder = folder
        self.kind = kind
        self.names = names
        self.lines: list[str] = []
        write_tokens(folder / "train")
        write_tokens(folder / "valid", seed=1, documents=4)
        config = small_config(folder)
        config["model"] |= {"kind": kind, "dropout": 0.1, "num_attention_heads": 4}
        config["training"]["steps"] = STEPS
        self.config = write_config(folder / "config.yaml", config)
        self.recordings: dict[str, dict[str, np.ndarray]] = {}
        references = {reference_of(n) for n in names} | {SINGLE}
        self.train(1, {name: sets for name, sets in REFERENCES.items() if name in references})

    def recording(self, name: str) -> dict[str, np.ndarray]:
        """Return the recording of the run under a layout."""
        if name in REFERENCES and name not in self.recordings:
            self.train(1, {name: REFERENCES[name]})
        elif name not in self.recordings:
            layouts = EXACT_LAYOUTS | HALF_LAYOUTS
            ranks = layouts[name][0]
            alike = [n for n, (r, _) in layouts.items() if r == ranks and n in self.names]
            first = alike.index(name) // TOGETHER * TOGETHER
            self.train(ranks, {n: layouts[n][1] for n in alike[first : first + TOGETHER]})
        return self.recordings[name]

    def replayed(self, name: str) -> dict[str, np.ndarray]:
        """Return the recording of a run under a layout that takes the routes of the single process."""
        ranks, sets = EXACT_LAYOUTS[name]
        key = f"{name}, replayed"
        self.train(ranks, {key: sets}, replay=self.folder / f"{reference_of(name)}.npz")
        return self.recordings[key]

    def train(self, ranks: int, layouts: dict[str, list[str]], replay: Path | None = None) -> None:
        """Train layouts, given by their overrides, with so many ranks; with the routes of the recording ``replay``."""
        described = {n: {"set": sets, "replay": replay and str(replay)} for n, sets in layouts.items()}
        fresh = ranks == 2 and self.kind == "chiar"  # these ranks start as a launcher starts them
        run_ranks(ranks, WORKER, self.config, self.folder, json.dumps(described), timeout=570, fresh=fresh)
        for name in layouts:
            self.recordings[name] = dict(np.load(self.folder / f"{name}.npz"))


@pytest.fixture(scope="module")
def runs_of(request, tmp_path_factory):
    """Yield a function that returns the runs of a kind of model, and print their table at the end."""
    selected = [item.callspec.params for item in request.session.items if item.path == request.path]
    all_runs: list[Runs] = []

    @functools.cache
    def runs_of_kind(kind: str) -> Runs:
        names = {params["name"] for params in selected if "name" in params and params["runs"] == kind}
        all_runs.append(Runs(tmp_path_factory.mktemp(kind), kind, names))
        return all_runs[-1]

    yield runs_of_kind
    for runs in all_runs:
        print(f"\n| {runs.kind} | loss | gradient norm | parameters | routes that flipped |\n|---|---|---|---|---|")
        print("\n".join(runs.lines))


@pytest.fixture(params=["chiar", "baseline"])
def runs(request, runs_of) -> Runs:
    return runs_of(request.param)


def for_kinds(*kinds):
    return pytest.mark.parametrize("runs", kinds, indirect=True)


@for_layouts(EXACT_LAYOUTS)
def test_the_loss_does_not_depend_on_the_layout(runs, name):
    single, other = runs.recording(reference_of(name)), runs.recording(name)
    flips = _flips(single, other)
    for margin in flips.values():
        assert margin < 1e-6, f"routes differ that no rounding explains: {flips}"
    if flips:  # with the same routes the bounds hold for every run
        other = runs.replayed(name)
    loss, norm = (_deviation(single[key], other[key]) for key in ("loss", "gradient_norm"))
    parameters, worst = _parameter_deviation(single, other)
    runs.lines.append(f"| {name} | {loss:.1e} | {norm:.1e} | {parameters:.1e} | {len(flips)} |")
    message = f"loss {loss:.1e}, gradient norm {norm:.1e}, parameters {parameters:.1e}, most in {worst}; flips {flips}"
    assert single["loss"].shape == (STEPS,)
    assert loss <= 2e-6, message
    assert norm <= 2e-6, message
    assert parameters <= 1e-5, message
    assert other["evaluation"] == pytest.approx(single["evaluation"], rel=2e-6), message
    for key in ("attention_share", "entropy", "gate"):
        np.testing.assert_allclose(other[key], single[key], rtol=1e-5, atol=1e-6, err_msg=key)
    for key in (key for key in single if key.startswith("running ")):
        np.testing.assert_allclose(other[key], single[key], rtol=2e-5, atol=2e-6, err_msg=key)
    if name.startswith("regularised"):
        assert _deviation(single["regulariser"], other["regulariser"]) <= 2e-6


@for_layouts(HALF_LAYOUTS)
def test_losses_in_16_bits_come_near(runs, name):
    single, other = runs.recording(reference_of(name)), runs.recording(name)
    loss, norm = (_deviation(single[key], other[key]) for key in ("loss", "gradient_norm"))
    runs.lines.append(f"| {name} | {loss:.1e} | {norm:.1e} | | |")
    assert loss <= 1e-2
    assert norm <= 2e-2  # a gradient that is lost on the way changes it by more
    if "regularised" in name:
        assert _deviation(single["regulariser"], other["regulariser"]) <= 1e-2


@for_kinds("chiar", pytest.param("baseline", marks=pytest.mark.slow))  # as are its layouts with documents
def test_documents_move_the_run(runs):
    """Without this the comparisons of layouts with documents would prove nothing about documents."""
    with_documents = runs.recording(reference_of("documents: "))
    assert _deviation(runs.recording(SINGLE)["loss"][5:], with_documents["loss"][5:]) > 1e-4


@for_kinds("chiar")
def test_the_scale_of_the_embedding_moves_the_run(runs):
    """Without this the comparisons of layouts with a scaled embedding would prove nothing about it."""
    runs.train(1, {"pre": ["model.norm=pre"]})
    assert _deviation(runs.recordings["pre"]["loss"], runs.recording(reference_of("scaled embedding: "))["loss"]) > 1e-3


@for_kinds("chiar")
def test_thresholds_and_heads_move(runs):
    """Without this the comparisons of layouts with running thresholds would prove nothing about them."""
    for kind, numbers in (("learned", 4), ("held share", 4)):
        recording = runs.recording(f"{kind}: {SINGLE}")
        ends = {key: value.item() for key, value in recording.items() if key.startswith("running ")}
        assert len(ends) == numbers and all(end not in (0.0, np.float32(0.79)) for end in ends.values()), ends
    head = runs.recording(f"learned: {SINGLE}")["parameter layers.1.router.value_head.bias"]
    assert head.item() != 0


@for_kinds("chiar")
def test_the_regulariser_moves_the_run(runs):
    """Without this the comparisons of regularised layouts would prove nothing about the regulariser's gradient."""
    regularised = runs.recording(reference_of("regularised: "))
    assert _deviation(runs.recording(SINGLE)["loss"][5:], regularised["loss"][5:]) > 1e-3


@for_kinds("chiar")
@pytest.mark.parametrize("kind", ("random", "random, documents"))
def test_coins_come_to_their_share_in_a_run(runs, kind):
    """Over 20 steps of 8 samples each layer is within 4.5 deviations of independent coins."""
    shares = runs.recording(f"{kind}: {SINGLE}")["attention_share"].mean(0)[1:3]
    coins = runs.recording(f"{kind}: {SINGLE}")["routes"][:, 0].size
    assert np.abs(shares - 0.4).max() < 4.5 * (0.4 * 0.6 / coins) ** 0.5


@for_kinds("chiar")
@pytest.mark.parametrize("kind", ("random", "random, documents", "hashed", "soft", "hard", "all at once"))
def test_routers_move_the_run(runs, kind):
    """Without this the comparisons of layouts with these routers would prove nothing about them."""
    assert _deviation(runs.recording(SINGLE)["loss"][5:], runs.recording(f"{kind}: {SINGLE}")["loss"][5:]) > 1e-4
    routes = runs.recording(f"{kind}: {SINGLE}")["routes"]
    if kind == "random":
        assert (routes[0] != routes[1]).any(), "another step has other samples"


@for_kinds("chiar")
def test_replayed_routes_are_taken(runs):
    single, name = runs.recording(SINGLE), "tp 2, pp 2, sequence, micro-batch 4"
    changed = dict(single)
    changed["routes"] = 1 - single["routes"]
    np.savez(runs.folder / "changed.npz", **changed)
    ranks, sets = LAYOUTS[name]
    runs.train(ranks, {"changed": sets}, replay=runs.folder / "changed.npz")
    recording = runs.recordings["changed"]
    assert (recording["routes"] == changed["routes"]).all()
    assert _deviation(single["loss"], recording["loss"]) > 1e-4


@for_kinds("chiar")
def test_muon_moves_the_run(runs):
    """Without this the comparisons of layouts under Muon would prove nothing about it."""
    assert _deviation(runs.recording(SINGLE)["loss"], runs.recording(f"muon: {SINGLE}")["loss"]) > 1e-3


def test_the_run_learns(runs):
    loss = runs.recording(SINGLE)["loss"]
    assert loss[-5:].mean() < loss[:5].mean() - 0.3


def _deviation(single: np.ndarray, other: np.ndarray) -> float:
    """Return the greatest relative difference."""
    return float(np.abs(other / single - 1).max())


def _parameter_deviation(single: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> tuple[float, str]:
    """Return the relative L2 distance over all parameters, and the name of that with the greatest share in it.

    Parameters are not compared one by one: AdamW divides a gradient by its own size, so that a number whose gradient
    vanishes moves by rounding alone. A filter's first number is left out for that reason: it shifts all channels of a
    row alike, which a norm behind it undoes.
    """
    names = [name for name in single if name.startswith("parameter ")]
    assert names
    assert set(names) == {name for name in other if name.startswith("parameter ")}
    squares: dict[str, float] = defaultdict(float)
    for name in names:
        assert np.isfinite(other[name]).all(), name
        compared = slice(1, None) if name.endswith(".filter") else slice(None)
        squares[name] = float(np.square(other[name].astype(np.float64) - single[name])[compared].sum())
    whole = sum(float(np.square(single[name].astype(np.float64)).sum()) for name in names)
    return (sum(squares.values()) / whole) ** 0.5, max(squares, key=squares.get)


def _flips(single: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the tokens whose routes differ, each with its distance |H - tau| in the single process."""
    assert single["routes"].shape == other["routes"].shape
    different = np.argwhere(single["routes"] != other["routes"])
    return {
        f"step {step} layer {layer} token {token}": float(single["margin"][step, layer, token])
        for step, layer, token in different
    }
