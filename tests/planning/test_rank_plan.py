"""Plans against tensors that are really allocated, and the list of layouts against the rules that it is made by."""

from __future__ import annotations

import itertools
import json
import random
import time
from dataclasses import replace

import pytest
from loss_memory_worker import measure
from support import ROOT, WORKERS, python, run_ranks, small_config, write_config, write_tokens

from megachiar.config import load_config
from megachiar.model import build_model
from megachiar.model.dtypes import DTYPES
from megachiar.planning.gpus import GPUS
from megachiar.planning.layout_search import Machine, find_layouts
from megachiar.planning.partition import balanced
from megachiar.planning.rank_plan import plan_ranks

ZERO, BF16, TP, PP = (
    "parallel.zero_stage=",
    "precision.compute=bf16",
    "parallel.tensor_size=2",
    "parallel.pipeline_size=2",
)
MUON = "optimizer.kind=muon"
LP = "precision.gradient_accumulation=bf16"
# name: (ranks, overrides)
CASES = {
    "fp32, ZeRO 0": (1, [ZERO + "0"]),
    "fp32, ZeRO 1": (1, []),
    "bf16, ZeRO 1": (1, [BF16]),
    "bf16 sums, ZeRO 2": (1, [BF16, LP, ZERO + "2"]),
    "fp32, ZeRO 2, dp 2": (2, [ZERO + "2"]),
    "fp32, ZeRO 3, dp 2": (2, [ZERO + "3"]),
    "bf16, ZeRO 1, dp 2": (2, [BF16]),
    "bf16, ZeRO 2, dp 2": (2, [BF16, ZERO + "2"]),
    "bf16, ZeRO 3, dp 2": (2, [BF16, ZERO + "3"]),
    "fp32, tp 2": (2, [TP]),
    "bf16, pp 2": (2, [BF16, PP]),
    "muon, fp32, ZeRO 0": (1, [MUON, ZERO + "0"]),
    "muon, fp32, tp 2": (2, [MUON, TP]),
    "muon, bf16, ZeRO 1, dp 2": (2, [MUON, BF16]),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the config's path, and by case the bytes that are alive on each rank as the optimizer steps."""
    folder = tmp_path_factory.mktemp("plan")
    write_tokens(folder / "train")
    config = small_config(folder)
    del config["data"]["validation"]
    config["model"] |= {"hidden_size": 192, "num_layers": 6, "num_attention_heads": 4, "max_sequence_length": 8}
    config["model"]["vocab_size"] = 256
    config["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 100_000}}
    path = write_config(folder / "config.yaml", config)
    for ranks in (1, 2):
        cases = {name: sets for name, (r, sets) in CASES.items() if r == ranks}
        run_ranks(ranks, WORKERS / "memory_worker.py", path, folder, json.dumps(cases))
    return path, {name: json.loads((folder / f"{name}.json").read_text()) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_is_allocated(measured, name):
    path, alive = measured
    ranks, sets = CASES[name]
    config = load_config(path, sets)
    replica = config.parallel.pipeline_size * config.parallel.tensor_size
    plans = plan_ranks(config, ranks // replica)
    assert len(plans) == config.parallel.pipeline_size
    for rank, seen in enumerate(alive[name]):
        memory = plans[rank * len(plans) // ranks].memory
        bucket = 100_000 * (2 if BF16 in sets else 4) if config.parallel.zero_stage == 3 else 0
        planned = memory.parameters + memory.gradients + memory.optimizer + bucket
        assert planned == pytest.approx(seen, rel=0.08), f"rank {rank}: {planned / seen:.3f} of what is alive"


@pytest.mark.parametrize("sets", [[], [BF16], [TP], [BF16, TP, "data.sequence_length=4"]], ids=str)
def test_buffers_of_the_loss_are_what_it_takes(tmp_path, sets):
    config = small_config(tmp_path)
    config["model"] |= {"vocab_size": 3000, "hidden_size": 48, "num_attention_heads": 4}
    config = load_config(write_config(tmp_path / "config.yaml", config), sets)
    (plan,) = plan_ranks(config, 1, device="cpu")
    rows = config.training.micro_batch_size * config.sequence_length
    vocabulary = 3000 // config.parallel.tensor_size
    taken, _ = measure(rows, 48, vocabulary, DTYPES[config.precision.compute], by_triton=False)
    assert taken * 0.98 <= plan.memory.buffers <= taken


def test_buffers_of_the_loss_are_the_last_stages_alone_and_follow_the_device():
    seven = ROOT / "configs" / "7b.yaml"
    config = load_config(seven)
    first, last = (plan.memory.buffers for plan in plan_ranks(config, 4))
    assert first == 0 < last
    by_torch = plan_ranks(load_config(seven, ["precision.kernels=torch"]), 4)[-1].memory.buffers
    on_cpu = plan_ranks(config, 4, device="cpu")[-1].memory.buffers
    assert last < by_torch and on_cpu < by_torch


@pytest.mark.parametrize(("stage", "copies"), [(0, 2), (1, 2), (2, 3)])
def test_captured_layers_hold_the_gradients_of_one_graph(tmp_path, stage, copies):
    path = write_config(tmp_path / "config.yaml", small_config(tmp_path))
    plain, captured = (
        plan_ranks(load_config(path, [f"{ZERO}{stage}", f"training.cuda_graphs={length}"]), 1)[0].memory
        for length in ("null", "2")
    )
    model = build_model(load_config(path).model, seed=0)
    largest = max(
        sum(weight.numel() for layer in list(model.layers)[start : start + 2] for weight in layer.parameters())
        for start in (0, 2)
    )
    assert captured.buffers - plain.buffers == copies * 4 * largest


def test_recomputed_activations_are_less_and_more_stages_hold_more_micro_batches():
    seven = load_config(ROOT / "configs" / "7b.yaml")
    first, last = (plan.memory for plan in plan_ranks(seven, 4))
    assert first.activations_recomputed < first.activations_kept / 5
    one = plan_ranks(load_config(ROOT / "configs" / "7b.yaml", ["parallel.pipeline_size=1"]), 8)[0].memory
    # The first of two stages holds two micro-batches, but half of the layers.
    assert first.activations_kept == pytest.approx(one.activations_kept, rel=0.15)
    assert not first.recomputes and last.activations_kept < first.activations_kept


def test_a_plan_counts_the_activations_of_the_shapes_that_the_run_would_have(tmp_path, monkeypatch):
    """At a tenth of the rows as keys, static shapes keep more. A plan for a GPU needs neither a GPU nor Triton."""
    monkeypatch.setattr("megachiar.kernels.triton_rope.triton", None)
    few = {"router": {"kind": "random", "attention_share": 0.1}, "attention": {"keys": "routed"}}
    path = write_config(tmp_path / "config.yaml", small_config(tmp_path, model=few))

    def kept(shapes: str, *sets: str, device: str = "cuda") -> float:
        (plan,) = plan_ranks(load_config(path, [f"training.static_shapes={shapes}", *sets]), 1, device=device)
        return plan.memory.activations_kept

    following = kept("false")
    tokens, d, layers = 2 * 32, 32, 2
    static = following + 4 * tokens * layers * d * (6 - (4 + 4 * 0.1))
    assert kept("true") == kept("auto") == kept("true", device="cpu") == pytest.approx(static)
    assert kept("auto", device="cpu") == kept("auto", "precision.kernels=torch") == following
    for sets in ([TP], [ZERO + "3"], ["model.num_attention_heads=4"]):  # heads of 8 channels have no kernel
        assert kept("auto", *sets) == kept("false", *sets), sets


def test_stages_are_balanced_as_no_other_cut_is():
    rng = random.Random(0)
    for _ in range(60):
        costs = [rng.choice([1.0, 2.5, 7.0, rng.random()]) for _ in range(rng.randint(1, 8))]
        stages = rng.randint(1, len(costs))
        bounds = balanced(costs, stages)
        best = min(
            max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs))))
            for cuts in itertools.combinations(range(1, len(costs)), stages - 1)
        )
        assert bounds[0] == 0 and bounds[-1] == len(costs) and len(set(bounds)) == stages + 1 == len(bounds)
        assert max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds)) == pytest.approx(best)


def test_the_head_and_the_cheap_first_layer_move_the_bounds():
    seven = load_config(ROOT / "configs" / "7b.yaml")
    first, last = plan_ranks(seven, 4)
    assert len(first.layers) > len(last.layers)
    assert first.flops == pytest.approx(last.flops, rel=0.06)


MACHINE = Machine(
    gpus=64,
    gpus_per_node=8,
    memory=72 * 2**30,
    gpu=GPUS["h100"],
)


def test_every_layout_that_is_listed_is_one_that_can_be_run():
    config = load_config(ROOT / "configs" / "7b.yaml")
    layouts, refused = find_layouts(config, MACHINE)
    assert len(layouts) > 20 and refused["need too much memory"] > 0
    assert [layout.seconds for layout in layouts] == sorted(layout.seconds for layout in layouts)
    for layout in layouts:
        again = load_config(ROOT / "configs" / "7b.yaml", layout.overrides)
        assert again == layout.config
        p = again.parallel
        assert p.pipeline_size * p.tensor_size * p.data_size == 64 and p.tensor_size <= 8
        assert layout.memory <= MACHINE.memory and 0 < layout.utilisation < 1


def test_less_memory_leaves_layouts_that_need_less():
    config = load_config(ROOT / "configs" / "7b.yaml")
    many, _ = find_layouts(config, MACHINE)
    small = replace(MACHINE, memory=12 * 2**30)
    few, _ = find_layouts(config, small)
    assert 0 < len(few) < len(many)
    assert {tuple(layout.overrides) for layout in few} < {tuple(layout.overrides) for layout in many}
    assert min(layout.seconds for layout in few) >= min(layout.seconds for layout in many)


def test_the_tool_is_done_in_seconds_and_says_when_nothing_fits():
    began = time.monotonic()
    done = python("tools/plan_layout.py", "--gpus", "64", "--memory-gib", "80", "--config", "configs/7b.yaml")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    overrides = done.stdout.rpartition("--set ")[2].split()
    plan = python(
        "-m",
        "megachiar.pretrain",
        "--config",
        "configs/7b.yaml",
        "--dry-run",
        "--set",
        *overrides,
        "--world-size",
        "64",
    )
    assert plan.returncode == 0 and "stage 0" in plan.stdout, plan.stderr
    nothing = python("tools/plan_layout.py", "--gpus", "2", "--memory-gib", "4", "--config", "configs/7b.yaml")
    assert nothing.returncode == 2 and "no layout fits 2 GPUs of 4 GiB" in " ".join(nothing.stderr.split())
    assert "Traceback" not in nothing.stderr
