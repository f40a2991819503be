"""torch.compile of the parts of layers: whole graphs, the same numbers, nothing compiled anew for other routes."""

from __future__ import annotations

import json

import pytest
import torch
from model_cases import VARIANTS, lively_model, small_model_config, token_batch
from support import pretrain, small_config, write_config, write_tokens
from torch._dynamo.utils import counters

from megachiar.config import load_config
from megachiar.engine.engine import check_compiler
from megachiar.errors import UserError
from megachiar.model.compiled import compile_layers


@pytest.fixture(autouse=True)
def forgotten():
    """What was compiled before."""
    torch._dynamo.reset()
    counters.clear()


def compiled_and_plain(**fields):
    config = small_model_config(**fields)
    compiled, plain = (lively_model(config).train() for _ in range(2))
    compile_layers(compiled, "aot_eager", has_documents=False)
    return compiled, plain


def assert_same_step(compiled, plain, seed: int = 0) -> None:
    tokens = token_batch(length=13, seed=seed)
    results = []
    for model in (compiled, plain):
        model.zero_grad()
        output = model(tokens[:, :-1], tokens[:, 1:])
        (output.loss + output.regulariser).backward()
        results.append(output)
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=0, atol=1e-12)
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ("post", "pre"))
@pytest.mark.parametrize("variant", ("baseline", "threshold", *(n for n in VARIANTS if n.endswith("three")), "random"))
def test_a_compiled_model_computes_the_same_in_whole_graphs(variant, norm):
    """A part that cannot be one graph raises: ``fullgraph``."""
    compiled, plain = compiled_and_plain(**VARIANTS[variant], norm=norm, dropout=0.1)
    assert_same_step(compiled, plain)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize("d", (32, 128))
def test_other_routes_compile_nothing_anew(d):
    """With the matrix product and with the FFT. A few first steps: static, dynamic, and without rows or with one."""
    compiled, plain = compiled_and_plain(hidden_size=d, router={"tau": 0.85 if d == 128 else 0.79}, num_layers=6)
    for seed in range(4):
        assert_same_step(compiled, plain, seed)
    before = counters["stats"]["unique_graphs"]
    for seed in range(4, 10):
        assert_same_step(compiled, plain, seed)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("overrides", [(), ("parallel.pipeline_size=2", "training.activation_checkpoint_interval=1")])
def test_a_run_learns_the_same(tmp_path, overrides):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    config = small_config(tmp_path, model={"dropout": 0.1}, training={"steps": 3})
    losses = []
    for name, backend in (("plain", "null"), ("compiled", "aot_eager")):
        sets = [f"training.compile={backend}", f"logging.folder={tmp_path}/{name}", *overrides]
        output = pretrain(write_config(tmp_path / "config.yaml", config), *sets, ranks=2 if overrides else 1)[0]
        assert ("compiled by aot_eager" in " ".join(output.split())) == (name == "compiled")
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if "loss" in record])
    plain, compiled = losses
    assert len(plain) > 3  # of steps, and of the evaluation at the end
    assert compiled == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    ("key", "overrides"),
    [("tensor_size 2", ["parallel.tensor_size=2"]), ("zero_stage 3", ["parallel.zero_stage=3"])],
)
def test_what_cannot_be_compiled_is_refused(tmp_path, key, overrides):
    path = write_config(tmp_path / "config.yaml", small_config(tmp_path))
    with pytest.raises(UserError, match=f"training.compile: is inductor with parallel.{key}"):
        load_config(path, ["training.compile=inductor", *overrides])


def test_a_missing_compiler_is_told(tmp_path, monkeypatch):
    from torch._inductor import config as inductor

    config = load_config(write_config(tmp_path / "config.yaml", small_config(tmp_path)), ["training.compile=inductor"])
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        check_compiler(config, torch.device("cpu"))
    check_compiler(config, torch.device("cuda"))
