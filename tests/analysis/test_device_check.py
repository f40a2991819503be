"""A check of a GPU keeps to its time, survives its parts, names what it left out, and rehearses on a CPU."""

from __future__ import annotations

import json
import sys
import time
import types

import pytest
import torch
from support import ROOT, run_command

from megachiar.analysis import device_parts, peer_operators
from megachiar.analysis.device_check import check_device, limit_of
from megachiar.analysis.device_parts import RESULT, Part, has_key, parts_of_check
from megachiar.analysis.device_table import table
from megachiar.cli import bench_device
from megachiar.config import load_config
from megachiar.errors import UserError


def part(name: str, program: str, share: float = 1.0, least_s: float = 1.0, kind: str = "steps") -> Part:
    return Part(name, kind, ("-c", program), share, least_s)


def checked(folder, *parts: Part, seconds: float) -> tuple[bool, list[dict], str]:
    """Run a check, and return whether it was good, the outcomes in the JSON, and the rows of the table."""
    is_good = check_device(parts, seconds=seconds, folder=folder / "new", root=ROOT, rehearse=True)
    record = json.loads((folder / "new" / "device_check.json").read_text())
    assert record["machine"]["device"].startswith("CPU") and record["machine"]["torch"] == torch.__version__
    rows = (folder / "new" / "device_check.md").read_text().splitlines()
    return is_good, record["parts"], "\n".join(row for row in rows if row.startswith("| "))


def test_a_part_that_fails_or_is_too_slow_does_not_stop_the_others(tmp_path):
    leaves = tmp_path / "left"
    child = f"import time; time.sleep(2); open({str(leaves)!r}, 'w')"
    slow = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    partial = f"open({RESULT!r}, 'w').write('{{\"lengths\": {{}}}}'); raise ValueError('no | luck')"
    began = time.monotonic()
    is_good, outcomes, rows = checked(
        tmp_path,
        part("good", "print('fine')"),
        part("bad", partial, kind="layers"),
        part("slow", slow, share=0.001),
        part("good again", ""),
        part("too long", "", least_s=100),
        seconds=60,
    )
    assert not is_good and time.monotonic() - began < 50
    assert [each["state"] for each in outcomes] == ["done", "failed", "timed out", "done", "left out"]
    assert outcomes[1]["error"].endswith("ValueError: no | luck") and outcomes[0]["error"] is None
    assert outcomes[1]["result"] == {"lengths": {}}, "what was written before is kept"
    assert "| bad | failed: ValueError: no \\| luck |" in rows
    assert "| too long | left out: needs 100 s, and " in rows
    time.sleep(2)
    assert not leaves.exists(), "a part's own processes end with it"


def test_time_that_is_left_over_is_shared_by_those_behind(tmp_path):
    parts = [part("a", "", 0.2, 10), part("b", "", 0.3, 10), part("c", "", 0.5, 10)]
    assert limit_of(parts, 100) == pytest.approx(20)
    assert limit_of(parts[1:], 99) == pytest.approx(99 * 0.3 / 0.8)
    assert limit_of(parts[2:], 9) is None
    assert limit_of(parts, 30) == 10
    is_good, outcomes, _ = checked(tmp_path, part("a", ""), part("b", "", least_s=1000), seconds=30)
    assert is_good and outcomes[1]["state"] == "left out", "what does not fit is no failure"


def test_variants_are_those_that_the_config_knows(monkeypatch):
    assert has_key("training.steps") and has_key("model.attention.keys")
    assert not has_key("training.no_such_key") and not has_key("nothing.steps") and not has_key("training.steps.more")
    monkeypatch.setattr(device_parts, "has_key", lambda key: "training" not in key)
    assert list(device_parts.eager_variants()) == ["keys_routed"]
    monkeypatch.setattr(device_parts, "has_key", lambda key: True)
    assert list(device_parts.eager_variants())[-1] == "graphs_dense"


def test_the_parts_are_commands_with_the_sizes_that_they_name():
    parts = parts_of_check(ROOT, rehearse=False)
    assert sum(each.share for each in parts) == pytest.approx(1)
    assert sum(each.least_s for each in parts) < 8 * 60
    by_name = {each.name: " ".join(each.words) for each in parts}
    assert "tests/kernels/test_triton.py" in by_name["tests"] and "-m gpu" in by_name["tests"]
    paper = load_config(ROOT / "configs" / "400m.yaml")
    assert (
        f"--layers 28 --hidden-size 1024 --heads 16 --sequence-length 256 --batch {paper.training.micro_batch_size}"
        in (by_name["steps, 400M"])
    )
    assert "--variant compiled training.compile=inductor" in by_name["steps, 12 layers, compiled"]
    rehearsed = parts_of_check(ROOT, rehearse=True)
    assert [each.name for each in rehearsed] == list(by_name)
    assert "inductor" not in str(rehearsed), "a compiler may be missing, and takes long"


def test_the_table_has_what_a_gpu_would_say():
    activity = {"busy_seconds": 0.012, "launches": 1500.0, "host_seconds": 0.018}
    step = {"seconds": [0.02] * 3, "activity": activity, "gpu_waits": 0.4, "model_flops_utilisation": 0.35}
    sizes = {"layers": 12, "hidden_size": 1024, "batch": 8, "sequence_length": 1024}
    dense, routed = {"speed_up": {}, **step}, {"speed_up": {"baseline bf16": [0.5, 0.4, 0.6]}, **step}
    timed = {"options": sizes, "contenders": {"baseline bf16": dense, "chiar bf16": routed}}
    layer = {"seconds": [0.001], "speed_up": [1.25, 1, 1.5], "activity": activity}
    layers = {"lengths": {"256": {"layers": {"layer": layer}, "operators": {"loss": layer}}}}
    tests = {"tests": 9, "failures": 1, "errors": 1, "skipped": 2}
    results = {"tests": tests, "steps": timed, "layers": layers}
    parts = [
        {"name": f"of {kind}", "kind": kind, "state": "done", "error": None, "result": result}
        for kind, result in results.items()
    ]
    page = table({"machine": {"device": "NVIDIA H200", "driver": None}, "rehearsal": False, "parts": parts})
    assert page.startswith("# Device check\n\ndevice NVIDIA H200.\n")
    assert "| of tests | 5 passed, 2 failed, 2 skipped |" in page
    of_step = "20.00 (20.00 to 20.00) | {} | 12.00 | 1500 | 18.00 | 40% | 35.0% |"
    assert f"| of steps | 12 layers, d 1024, 8 x 1024, baseline bf16 | {of_step.format('')}" in page
    assert f"| of steps | 12 layers, d 1024, 8 x 1024, chiar bf16 | {of_step.format('0.50x')}" in page
    of_layer = "1.00 (1.00 to 1.00) | {} | 12.00 | 1500 | 18.00 |  |  |"
    assert f"| of layers | T 256, layer | {of_layer.format('1.25x')}" in page
    assert f"| of layers | T 256, loss | {of_layer.format('')}" in page


def test_operators_of_other_libraries_are_taken_where_they_are_installed(monkeypatch):
    for name in ("flash_attn", "liger_kernel", "liger_kernel.ops.fused_linear_cross_entropy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert peer_operators.flash_attention() is None and peer_operators.liger_loss() is None
    flash = types.SimpleNamespace(flash_attn_func=lambda q, k, v, causal: (q, k, v, causal))
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    assert peer_operators.flash_attention()(1, 2, 3) == (1, 2, 3, True)
    function = types.SimpleNamespace(apply=lambda *arguments: (arguments, None))
    package = types.ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    package.LigerFusedLinearCrossEntropyFunction = function
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert peer_operators.liger_loss()("x", "head", "targets")[:3] == ("x", "head", "targets")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_machine_without_a_gpu_is_told_to_rehearse():
    with pytest.raises(UserError, match="--rehearse"):
        bench_device.main([])


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path):
    done = run_command("tools/device_check.sh", "--rehearse", "--folder", tmp_path, PYTHON=sys.executable, timeout=600)
    record = json.loads((tmp_path / "device_check.json").read_text())
    assert done.returncode == 0, (done.stderr, [each["error"] for each in record["parts"]])
    assert {each["state"] for each in record["parts"]} == {"done"} and record["rehearsal"]
    tests, steps, layers, *_ = (each["result"] for each in record["parts"])
    assert tests["tests"] == tests["skipped"] > 0
    assert {"chiar bf16", "baseline bf16", "keys_routed bf16"} <= set(steps["contenders"])
    assert all(entry["activity"]["operations"] > 0 for entry in steps["contenders"].values())
    assert list(layers["lengths"]) == ["8", "16"]
    page = (tmp_path / "device_check.md").read_text()
    contenders = 2 + len(device_parts.compiled_variants("aot_eager"))
    assert page.startswith("# Rehearsal") and page.count("\n| steps, 400M, compiled |") == contenders
