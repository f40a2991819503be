"""torch.compile of layers and their parts: whole graphs, the same numbers, nothing compiled anew for other routes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from model_cases import VARIANTS, lively_model, small_model_config, token_batch
from support import WORKERS, pretrain, run_ranks, small_config, write_config, write_tokens
from torch._dynamo.utils import counters

from megachiar.config import load_config
from megachiar.engine.engine import check_compiler
from megachiar.errors import UserError
from megachiar.model.compiled import compile_layers
from megachiar.model.kv_cache import DecodingCache, SequenceCache
from megachiar.model.static_shapes import use_static_shapes


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


def assert_same_step(compiled, plain, seed: int = 0, sequences: int = 3) -> None:
    tokens = token_batch(sequences, length=13, seed=seed)
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
        assert ("layers compiled by aot_eager" in " ".join(output.split())) == (name == "compiled")
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if "loss" in record])
    plain, compiled = losses
    assert len(plain) > 3  # of steps, and of the evaluation at the end
    assert compiled == pytest.approx(plain, abs=1e-5)


STATIC = "training.static_shapes=true"


def static_run(folder, **model):
    """Return the config of a run whose layers have static shapes, on tokens in ``folder``."""
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    config = small_config(folder, model={"num_layers": 6, "dropout": 0.1, **model}, training={"steps": 4})
    return write_config(folder / "config.yaml", config)


def losses_of(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_of_static_shapes_shares_one_graph_a_kind_of_layer(tmp_path):
    """The kinds are DCT mixing, routed and attention. Each routed layer has a number and a threshold of its own."""
    router = {"kind": "hashed", "tau": [0.77, 0.78, 0.79, 0.8]}
    config, folders = static_run(tmp_path, router=router, dropout=0.0), [tmp_path / "plain", tmp_path / "compiled"]
    pretrain(config, STATIC, f"logging.folder={folders[0]}")
    sets = [STATIC, "training.compile=aot_eager", f"logging.folder={folders[1]}"]
    (output,) = run_ranks(1, WORKERS / "graphs_worker.py", config, *sets)
    (counted,) = (line for line in output.splitlines() if line.startswith("[") and line.endswith("}]"))
    graphs, breaks = json.loads(counted)  # what Triton says of its own end may follow
    assert (graphs, breaks) == (3, {})
    assert "layers compiled by aot_eager" in " ".join(output.split())
    plain, compiled = map(losses_of, folders)
    assert len(plain) > 4
    assert compiled == pytest.approx(plain, abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_a_run_of_static_shapes_compiled_by_inductor_learns_the_same(tmp_path):
    config, folders = static_run(tmp_path), [tmp_path / "plain", tmp_path / "compiled"]
    pretrain(config, STATIC, f"logging.folder={folders[0]}")
    output = pretrain(config, STATIC, "training.compile=inductor", f"logging.folder={folders[1]}")[0]
    assert "layers compiled by inductor" in " ".join(output.split())
    plain, compiled = map(losses_of, folders)
    assert len(plain) > 4
    assert compiled == pytest.approx(plain, abs=1e-5)


def test_a_resumed_pipeline_of_compiled_layers_learns_the_same(tmp_path):
    config, folders = static_run(tmp_path), [tmp_path / "plain", tmp_path / "compiled"]
    schedule = "schedule.decay_steps=40"  # one for runs of any number of steps
    layout = [STATIC, schedule, "parallel.pipeline_size=2"]
    pretrain(config, STATIC, schedule, f"logging.folder={folders[0]}")
    for steps in (2, 4):
        sets = ["training.compile=aot_eager", f"training.steps={steps}", f"logging.folder={folders[1]}"]
        pretrain(config, *layout, *sets, ranks=2)
    plain, compiled = map(losses_of, folders)
    assert compiled[-1] == pytest.approx(plain[-1], abs=1e-5)


def test_passes_of_other_shapes_and_behind_a_cache_go_on():
    config = small_model_config(dropout=0.1)
    compiled, plain = (lively_model(config).train() for _ in range(2))
    for model in (compiled, plain):
        use_static_shapes(model)
    compile_layers(compiled, "aot_eager", has_documents=False)
    for sequences in (3, 2):
        assert_same_step(compiled, plain, sequences=sequences)
    for model in (compiled, plain):
        model.eval()
    with torch.no_grad():
        for sequences in (3, 2, 1):
            tokens = token_batch(sequences)
            expected = plain(tokens).logits
            torch.testing.assert_close(compiled(tokens).logits, expected, rtol=0, atol=1e-12)
            cache = DecodingCache(SequenceCache() for _ in range(sequences))
            parts = [compiled(part, cache=cache).logits for part in tokens.split((7, 5), 1)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-10)


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
