"""Benchmarks run, take turns, and say what they measured; how fast anything is, is no matter of tests."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from support import forked_python, python

from megachiar.benchmark import Spread, Times, measure_interleaved, timed
from megachiar.cli import bench_checkpoint, bench_train
from megachiar.errors import UserError

SMALL = ("--hidden-size", "32", "--heads", "2", "--threads", "1", "--rounds", "2")
STEPS = (*SMALL, "--layers", "3", "--sequence-length", "16", "--batch", "2", "--vocab-size", "64")
PEER = """
import os, sys
print("a greeting")
for line in sys.stdin:
    print(int(line) * int(os.environ["BENCH_HIDDEN_SIZE"]), flush=True)
"""


def test_contenders_take_turns_and_a_ratio_is_of_the_same_round():
    calls = []
    clock = {"a": iter([1.0, 2.0, 3.0]), "b": iter([2.0, 8.0, 9.0])}
    times = measure_interleaved({n: lambda n=n: calls.append(n) or next(clock[n]) for n in clock}, 3)
    turns = [calls[i : i + 2] for i in (0, 2, 4)]
    assert all(sorted(turn) == ["a", "b"] for turn in turns) and len(set(map(tuple, turns))) == 2, "in either order"
    assert times.spread("a") == Spread(2.0, 1.5, 2.5)
    assert times.speed_up("a", over="b") == Spread(3.0, 2.5, 3.5)
    assert times.speed_up("b", over="a").median == pytest.approx(1 / 3)
    assert Times({"a": [2.0]}).spread("a") == Spread(2.0, 2.0, 2.0)


def test_timed_measures_one_call_after_the_warm_up():
    calls = []
    measure = timed(lambda: calls.append(0), torch.device("cpu"))
    warm = len(calls)
    assert warm > 0
    assert 0 < measure() < 1
    assert len(calls) == warm + 1


@pytest.mark.parametrize(
    ("variant", "override", "more", "precisions"),
    [
        ("deeper", "model.num_layers=4", True, ["fp32"]),
        pytest.param("compiled", "training.compile=aot_eager", False, ["fp32", "bf16"], marks=pytest.mark.slow),
    ],
)
def test_training_steps_beside_a_peer(tmp_path, variant, override, more, precisions):
    (tmp_path / "peer.py").write_text(PEER)
    peer = f"other={sys.executable} {tmp_path / 'peer.py'}"
    result = tmp_path / "made" / "result.json"
    others = ("--precision", *precisions, "--bound", "--peer", peer, "--variant", variant, override)
    done = forked_python("tools/bench_train.py", *STEPS, *others, "--json", result)
    assert done.returncode == 0, done.stderr
    record = json.loads(result.read_text())["contenders"]
    kinds = ("chiar", variant, "baseline", "products")
    ours = {f"{kind} {precision}" for kind in kinds for precision in precisions}
    assert set(record) == ours | {"other"}
    assert record["other"]["seconds"] == [32.0, 32.0]  # what the peer says of itself, a step
    chiar = record["chiar fp32"]
    assert len(chiar["seconds"]) == 2
    assert chiar["speed_up"]["other"][0] == pytest.approx(sum(32.0 / s for s in chiar["seconds"]) / 2)
    assert chiar["flops"] < record["baseline fp32"]["flops"]
    assert chiar["attention_share"] == pytest.approx((0 + 0.5 + 1) / 3, abs=0.1)  # of its three layers
    assert (record[f"{variant} fp32"]["flops"] > chiar["flops"]) == more
    assert 0 < chiar["step_bytes"] < chiar["peak_bytes"]
    assert record["products fp32"]["flops"] == pytest.approx(chiar["flops"], rel=0.01)
    assert "peak_bytes" not in record["products fp32"]  # what it keeps is no step's
    assert "of other" in done.stdout
    assert chiar["activity"]["operations"] > record["baseline fp32"]["activity"]["operations"] > 100
    assert "activity" not in record["products fp32"] and "model_flops_utilisation" not in chiar
    assert done.stdout.count("no MFU") == 1 and done.stdout.count("aten operations") == 3 * len(precisions)


def test_utilisation_is_of_the_peak_and_of_the_steps_time():
    activity = {"launches": 1500.0, "kernels": 1600.0, "busy_seconds": 0.012, "waits": 25.0, "host_seconds": 0.018}
    report = {"flops": 4e12, "activity": activity}
    known = bench_train.utilisation(report, seconds=0.02, peak=1e15)
    assert known == {"model_flops_utilisation": pytest.approx(0.2), "gpu_waits": pytest.approx(0.4)}
    assert bench_train.describe_utilisation(report | known) == (
        "MFU 20.0%; 1,500 launches of 1,600 kernels; host 18.0 ms and 25 waits; GPU busy 12.0 ms, waits 40%"
    )
    assert bench_train.utilisation(report, seconds=0.01, peak=None) == {"gpu_waits": 0.0}
    assert bench_train.describe_utilisation({"activity": {"operations": 2000.0}}) == "2,000 aten operations"
    assert bench_train.describe_utilisation({"seconds": [1.0]}) == ""


@pytest.mark.slow
def test_kinds_of_routers_are_compared_at_one_share(tmp_path):
    hard = ("model.router.kind=hard", "model.router.tau=null")
    variants = {
        "published": hard,
        "dct_only": (*hard, "model.router.hard_gradient=dct_only"),
        "hashed": ("model.router.kind=hashed",),
    }
    result = tmp_path / "result.json"
    named = [word for name, sets in variants.items() for word in ("--variant", name, *sets)]
    done = forked_python("tools/bench_train.py", *STEPS, *named, "--attention-share", "0.25", "--json", result)
    assert done.returncode == 0, done.stderr
    record = json.loads(result.read_text())["contenders"]
    for name in ("chiar fp32", *(f"{name} fp32" for name in variants)):
        assert record[name]["routed_attention_share"] == pytest.approx(0.25, abs=0.08), name
        assert record[name]["attention_share"] == pytest.approx((0 + 0.25 + 1) / 3, abs=0.03), name
    published, dct_only = record["published fp32"], record["dct_only fp32"]
    assert published["flops"] > dct_only["flops"] > record["chiar fp32"]["flops"]
    assert record["hashed fp32"]["flops"] > record["chiar fp32"]["flops"]
    ratio = [b / a for a, b in zip(published["seconds"], dct_only["seconds"], strict=True)]
    assert published["speed_up"]["dct_only fp32"][0] == pytest.approx(sum(ratio) / 2)
    assert "of published fp32" in done.stdout and "in routed layers" in done.stdout
    assert record["baseline fp32"]["routed_attention_share"] is None


@pytest.mark.parametrize("shares", ([0.7, 0.3], [0.5, 0.2, 0.3], [0.0, 1.0]))
def test_numbers_are_added_to_logits_for_a_share(shares):
    logits = torch.randn(4000, len(shares), generator=torch.Generator().manual_seed(0)) + torch.arange(len(shares))
    largest = (logits + bench_train.logits_for(shares, logits)).argmax(1)
    got = torch.bincount(largest, minlength=len(shares)) / len(logits)
    assert got.tolist() == pytest.approx(shares, abs=0.002)


def test_the_bound_of_a_step_is_its_products_alone():
    ones, product = torch.ones(4, 4), torch.empty(4, 4)

    def step() -> torch.Tensor:
        x = torch.addmm(ones, ones, ones, out=product).sigmoid().view(1, 1, 4, 4)
        return F.scaled_dot_product_attention(x, x, x)

    repeat = bench_train.products_of(step)
    product.zero_()
    with torch.profiler.profile() as profile:
        repeat()
    assert (product == 5).all()
    called = {event.key for event in profile.key_averages()}
    assert any("attention" in name for name in called) and "aten::sigmoid" not in called


def test_a_bound_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="cannot replay a step on cuda"):
        bench_train.main([*STEPS, "--bound"])


@pytest.mark.parametrize("command", ("/nowhere/program", "python -c 'no end"))
def test_a_peer_that_cannot_be_started_is_named(command):
    done = forked_python("tools/bench_train.py", *STEPS, "--peer", f"broken={command}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"--peer broken: cannot start {command!r}" in done.stderr and "remedy" in done.stderr


def test_a_peer_that_ends_is_named_and_ends_the_benchmark():
    done = forked_python("tools/bench_train.py", *STEPS, "--peer", f"broken={sys.executable} -c 'raise SystemExit(7)'")
    assert done.returncode == 2
    assert "broken" in done.stderr and "exit code 7" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variant", "message"),
    [(("chiar", "model.dropout=0.1"), "no other contender has"), (("odd", "model.heads=3"), "model.heads")],
)
def test_a_variant_that_is_none_is_refused(variant, message):
    done = forked_python("tools/bench_train.py", *STEPS, "--variant", *variant)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_sizes_that_make_no_model_are_refused():
    done = forked_python("tools/bench_train.py", *STEPS, "--heads", "5")
    assert done.returncode == 2
    assert "num_attention_heads" in done.stderr and "Traceback" not in done.stderr


def test_layers_and_operators(tmp_path):
    result = tmp_path / "layers.json"
    sizes = ("--sequence-length", "8", "32", "--tokens", "16")
    done = forked_python("tools/bench_layers.py", *SMALL, *sizes, "--json", result)
    assert done.returncode == 0, done.stderr
    lengths = json.loads(result.read_text())["lengths"]
    assert {length: found["sequences"] for length, found in lengths.items()} == {"8": 2, "32": 1}
    for found in lengths.values():
        dense, *routed = found["layers"].values()
        assert dense["speed_up"][0] == 1.0 and len(routed) == 4
        assert dense["activity"]["operations"] < routed[0]["activity"]["operations"]
        assert all(len(entry["seconds"]) == 2 for entry in found["operators"].values())


PEER_TOOL = """
import sys
prefix = sys.argv[sys.argv.index("--output-prefix") + 1]
open(prefix + "_text_document.bin", "wb").write(b"something else")
"""


def test_preprocessing_beside_a_peer(tmp_path):
    pytest.importorskip("gigatoken")
    (tmp_path / "peer" / "tools").mkdir(parents=True)
    for name in ("preprocess_data.py", "preprocess_data_fast.py"):
        (tmp_path / "peer" / "tools" / name).write_text(PEER_TOOL)
    options = ("--megabytes", "1", "--rounds", "2", "--workers", "1", "--folder", tmp_path)
    result = tmp_path / "result.json"
    done = python("tools/bench_data.py", "preprocess", *options, "--peer", tmp_path / "peer", "--json", result)
    assert done.returncode == 0, done.stderr
    assert "DIFFERENT bytes: [['ours fast', 'ours reference'], ['peer', 'peer fast']]" in done.stdout
    record = json.loads(result.read_text())
    seconds = record["seconds"]
    assert set(seconds) == {"ours fast", "ours reference", "peer", "peer fast"}
    expected = sum(b / a for a, b in zip(seconds["ours fast"], seconds["peer"], strict=True)) / 2
    assert record["ratios"]["ours fast over peer"] == pytest.approx(expected)
    assert record["memory_mib"]["ours fast"] > 30


def test_reading_samples_and_a_peer_that_is_none(tmp_path):
    done = python("tools/bench_data.py", "read", "--megabytes", "1", "--rounds", "2", "--folder", tmp_path)
    assert done.returncode == 0 and done.stdout.count("samples/s of 2048 tokens") == 2, done.stderr
    done = python("tools/bench_data.py", "preprocess", "--megabytes", "1", "--peer", tmp_path / "nowhere")
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_many_tiny_files_beside_one(tmp_path):
    pytest.importorskip("gigatoken")
    result = tmp_path / "result.json"
    options = ("--files", "1500", "--rounds", "2", "--workers", "2", "--folder", tmp_path)
    done = python("tools/bench_data.py", "files", *options, "--json", result)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("x (") == 2 and "all wrote the same bytes" in done.stdout
    record = json.loads(result.read_text())
    for engine in ("fast", "reference"):
        one, many = record["seconds"][f"{engine}, one file"], record["seconds"][f"{engine}, many files"]
        assert record["ratios"][engine] == pytest.approx(sum(b / a for a, b in zip(one, many, strict=True)) / 2)


def test_saving_is_timed_and_its_folder_removed(tmp_path):
    result, folder = tmp_path / "result.json", tmp_path / "saved"
    small = ("model.num_layers=3", "model.hidden_size=32", "model.num_attention_heads=2", "training.threads=1")
    others = ("--folder", folder, "--rounds", "2", "--json", result)
    done = forked_python("tools/bench_checkpoint.py", "--config", "configs/tiny.yaml", *others, "--set", *small)
    assert done.returncode == 0, done.stderr
    assert "checksums / save" in done.stdout and "held up / copy" in done.stdout
    record = json.loads(result.read_text())
    assert set(record["seconds"]) == {"copy", "checksums", "save", "held up"}
    assert all(len(seconds) == 2 for seconds in record["seconds"].values())
    assert not folder.exists()
    with pytest.raises(UserError, match="exists already"):
        bench_checkpoint.main(["--folder", str(tmp_path)])
    assert result.exists(), "a folder that was there is left alone"


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
def test_decoding_is_timed_beside_a_full_pass_and_the_cache_is_counted(tmp_path, precision):
    sizes = (*SMALL, "--layers", "4", "--vocab-size", "64", "--context", "64", "--tokens", "3", "--batch", "1", "2")
    more = ("--precision", precision, "--without-transformers", "--cpu-time", "--json", tmp_path / "result.json")
    done = forked_python("-m", "megachiar", "bench-decode", *sizes, *more)
    assert "full pass a token" in done.stdout and "of it" in done.stdout
    record = json.loads((tmp_path / "result.json").read_text())
    assert set(record["batches"]) == {"1", "2"}
    for batch in record["batches"].values():
        assert set(batch["seconds"]) == {"cache", "full pass a token", "cache, dense"}
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in batch["seconds"].values())
    assert 0 < record["cache_bytes"]["ratio"] < 1


def test_decoding_is_timed_beside_transformers():
    pytest.importorskip("transformers")
    sizes = (*SMALL, "--layers", "3", "--vocab-size", "64", "--context", "16", "--tokens", "3", "--batch", "2")
    done = python("-m", "megachiar", "bench-decode", *sizes)
    assert "cache over transformers, dense" in done.stdout
