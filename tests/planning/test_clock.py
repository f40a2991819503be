"""The planner's step times beside published ones (docs/planning/published_steps.csv names row and source)."""

from __future__ import annotations

import csv
import sys
from dataclasses import fields

import pytest
from support import ROOT

from megachiar.cli.plan import gpu_of, parse
from megachiar.config import load_config
from megachiar.planning.clock import Software, StepTime, step_time
from megachiar.planning.gpus import GPUS
from megachiar.planning.rank_plan import plan_ranks

sys.path.insert(0, str(ROOT / "docs"))
import clock_tables
from clock_tables import layout_config, median_error, published_seconds, rate

UNFUSED = Software(fused_attention=False, splits_pipeline=True)
# MFU in per cent, as Megatron-LM's README gave it beside the times of arXiv:2205.05198, table 5, on A100.
UTILISATIONS = {"GPT 22B": 41.5, "GPT 175B": 51.4, "GPT 530B": 56.0, "GPT 1T": 56.3}
# The rows may set two shares of an A100's peak, two of an H100's, and two numbers of ZeRO 3.
MOST_ROWS_THAT_SET_CONSTANTS = 8


@pytest.fixture(scope="module")
def compared():
    return clock_tables.comparisons()


def test_half_of_the_held_out_steps_are_within_15_percent_in_every_source(compared):
    held = [one for one in compared if not one.sets_constants]
    assert len(compared) - len(held) <= MOST_ROWS_THAT_SET_CONSTANTS < len(held) / 10
    assert median_error(held) < 0.05
    for source in {one.row["source"] for one in held}:
        assert median_error(one for one in held if one.row["source"] == source) < 0.15, source
    assert max(abs(one.error) for one in held) < 0.3


def test_pairs_of_layouts_are_in_the_published_order(compared):
    pairs = list(clock_tables.pairs_of_layouts(compared))
    assert len(pairs) >= 9
    for fast, slow in pairs:
        assert rate(fast, fast.estimate.total) > rate(slow, slow.estimate.total), (fast.row, slow.row)


def test_the_page_has_the_errors_of_this_clock():
    written = clock_tables.PAGE.read_text()
    assert written == clock_tables.filled(written), "python docs/generated_pages.py fills the tables anew"


@pytest.mark.parametrize("model", UTILISATIONS)
def test_times_and_utilisations_that_one_source_gives_agree_by_its_count_of_flops(model):
    with clock_tables.ROWS.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["source"], r["model"]) == ("Megatron 2022", model)]
    (row,) = [row for row in rows if row["recompute"] == "no"]
    by_rate = row | {"published": str(UTILISATIONS[model] / 100 * 312), "unit": "TFLOP/s"}
    assert published_seconds(by_rate) == pytest.approx(published_seconds(row), rel=0.005)


def seconds(software: Software = UNFUSED, gpu: str = "a100", **layout) -> float:
    return parts(software, gpu, **layout).total


def parts(software: Software = UNFUSED, gpu: str = "a100", **layout) -> StepTime:
    config = layout_config(**({"layers": 32, "length": 2048} | layout))
    replicas = layout.get("dp", 1)
    return step_time(config, replicas, GPUS[gpu], 8, plan_ranks(config, replicas), software)


@pytest.mark.parametrize("batch", [32, 128])
def test_tensor_groups_of_a_node_are_fastest_as_in_figure_13_of_megatron_2021(batch):
    layouts = {tp: seconds(hidden_size=20480, heads=128, tp=tp, pp=64 // tp, batch=batch) for tp in (2, 4, 8, 16, 32)}
    assert min(layouts, key=layouts.__getitem__) == 8


@pytest.mark.parametrize("batch", [32, 512])
def test_more_stages_and_fewer_replicas_are_slower_as_in_figure_14(batch):
    times = [seconds(hidden_size=3840, heads=32, pp=pp, dp=64 // pp, batch=batch) for pp in (2, 4, 8, 16, 32)]
    assert times == sorted(times)


@pytest.mark.parametrize("batch", [32, 128, 512])
def test_more_tensor_parallelism_and_fewer_replicas_are_slower_as_in_figure_15(batch):
    times = [seconds(hidden_size=3840, heads=32, tp=tp, dp=64 // tp, batch=batch) for tp in (2, 4, 8, 16, 32)]
    assert times == sorted(times)


def test_the_micro_batch_of_figure_16_is_the_fastest():
    sizes = {
        size: seconds(hidden_size=15360, heads=128, tp=8, pp=8, micro_batch=size, batch=512) for size in (1, 2, 4, 8)
    }
    assert min(sizes, key=sizes.__getitem__) == 2


def test_transforms_of_routed_layers_are_timed_as_the_fp32_products_of_a_gpu():
    config = load_config(ROOT / "configs" / "7b.yaml")
    stages = plan_ranks(config, 4)
    shared = step_time(config, 4, GPUS["h100"], 8, stages).transforms
    whole = config.model_copy(update={"parallel": config.parallel.model_copy(update={"sequence": False})})
    assert step_time(whole, 4, GPUS["h100"], 8, stages).transforms == pytest.approx(8 * shared)
    # A product of (32768, 1024) and (1024, 1024) in fp32 took 1.0 ms on an H200 (docs/benchmarks/gpu.md).
    assert 2 * 32768 * 1024**2 / GPUS["h200"].fp32 == pytest.approx(1.0e-3, rel=0.35)


def test_every_part_follows_what_it_is_made_of():
    base = {"hidden_size": 4096, "heads": 32, "batch": 64, "recompute": False}
    one = parts(**base, dp=8)
    assert {field.name for field in fields(one) if not getattr(one, field.name)} == {
        "transforms",
        "tensor",
        "bubble",
        "pipeline",
    }
    across = parts(**base, dp=16)
    assert across.data > one.data and across.optimizer == pytest.approx(one.optimizer / 2)
    recomputed = parts(**base | {"recompute": True}, dp=8)
    assert 1.25 < recomputed.products / one.products < 4 / 3  # the head is not recomputed
    staged = parts(**base, pp=4, dp=2)
    pace = (staged.products + staged.attention + staged.memory + staged.tensor) / 32
    assert staged.bubble == pytest.approx(3 * pace)
    assert parts(Software(fused_attention=False, chunks=2), **base, pp=4, dp=2).bubble == pytest.approx(1.5 * pace)


def test_a_given_speed_replaces_that_of_the_gpu_and_hides_an_mfu_of_no_gpu():
    options = ["--gpus", "8", "--memory-gib", "80", "--config", "x"]
    assert gpu_of(parse(options)) == GPUS["h100"]
    assert gpu_of(parse([*options, "--gpu", "a100"])) == GPUS["a100"]
    measured = gpu_of(parse([*options, "--tflops", "500", "--node-gb-s", "300", "--network-gb-s", "20"]))
    assert (measured.products, measured.node_bandwidth, measured.network_bandwidth) == (500e12, 300e9, 20e9)
    assert measured.peak is None
    assert gpu_of(parse([*options, "--gpu", "a100", "--tflops", "200"])).peak == 312e12
