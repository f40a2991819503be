"""Checkpoints that the published code's own scripts train and save, and ours that it loads, beside that code.

``pytest --published-code FOLDER`` names its folder CHIAR-former; without it these tests are skipped.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published_files import long_record
from support import WORKERS, python, rewrite_config

from megachiar.checkpoint.reading import locate_checkpoint
from megachiar.checkpoint.weights_alone import write_weights
from megachiar.cli import export
from megachiar.inference.loading import load_for_inference
from megachiar.model import ChiarFormer, build_model

import_ = importlib.import_module("megachiar.cli.import_")

TAU = ("--tau", "0.79", "0.80")
KINDS = {"threshold": TAU, "soft": (), "hard": (), "baseline": (), "mixed": TAU, "classifier": TAU}
KINDS |= {"baseline_classifier": ()}


def published_code(request: pytest.FixtureRequest, *words: object) -> str:
    """Run the worker on the published code and return what it prints."""
    code = request.config.getoption("--published-code")
    if code is None:
        pytest.skip("--published-code names no folder")
    done = python(WORKERS / "published_code_worker.py", code.resolve(), *map(str, words), timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory) -> Path:
    """KIND.pt of each kind, as the scripts have saved them, with KIND.pt.answers."""
    folder = tmp_path_factory.mktemp("published")
    published_code(request, "train", folder)
    return folder


def compare(model: ChiarFormer, answers: dict[str, Any], dtype: torch.dtype) -> None:
    """Compare logits and routes of our model with the answers of the published code."""
    tokens, routes = answers["tokens"], {}
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(lambda _, x, decision, n=name: routes.update({n[:-7]: decision.operator}))
    with torch.no_grad():
        logits = model(tokens, head="main" if model.heads else None).logits
    expected = answers["fp64" if dtype == torch.float64 else "fp32"]
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(logits, expected.to(dtype), rtol=0, atol=tolerance)
    assert routes.keys() == answers["routes"].keys()
    for name, operators in answers["routes"].items():
        assert torch.equal(routes[name].view(tokens.shape), operators), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_its_scripts_save_is_imported_and_what_we_export_is_loaded(kind, trained, request, tmp_path):
    run, file = tmp_path / "run", tmp_path / "exported.pt"
    import_.main([str(trained / f"{kind}.pt"), "--output", str(run), *KINDS[kind]])
    answers = torch.load(trained / f"{kind}.pt.answers")
    for dtype in (torch.float64, torch.float32):
        compare(load_for_inference(run, dtype=dtype)[1], answers, dtype)
    export.main([str(run), "--to", "published", str(file)])
    published_code(request, "answer", file, tmp_path / "answers")
    again = torch.load(tmp_path / "answers")
    assert torch.equal(again["fp64"], answers["fp64"]) and torch.equal(again["fp32"], answers["fp32"])


def test_the_record_of_long_sequences_is_what_it_computes(request):
    """Sequences of 256 tokens and weights of deviation 0.1, which test_published_checkpoints.py compares with ours."""
    found, recorded = json.loads(published_code(request, "record-long")), long_record()
    for kind, model in recorded["models"].items():
        now = found["models"][kind]
        assert now["routes"] == model["routes"] and now["shapes"] == model["shapes"]
        for name, tolerance in (("fp64", 1e-9), ("fp64, tables of fp32", 1e-6)):
            now_logits, then = (
                torch.tensor(logits[name], dtype=torch.float64) for logits in (now["logits"], model["logits"])
            )
            torch.testing.assert_close(now_logits, then, rtol=0, atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"dct": {"gain": 1.0, "entropy_dc_weight": 2.0, "entropy_epsilon": 1e-8}}])
def test_other_weights_of_ours_have_our_logits_there(changes, trained, request, tmp_path):
    """With all numbers of a model at random, and with a gain that the published code does not have."""
    run = tmp_path / "run"
    import_.main([str(trained / "threshold.pt"), "--output", str(run), *TAU])
    config, _, state = load_for_inference(run)
    model = build_model(config.model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_weights(config, weights, step=state.step, data=state.data, origin="drawn", validation={})
    content = yaml.safe_load((locate_checkpoint(run) / "config.yaml").read_text())
    content["model"] |= changes
    rewrite_config(locate_checkpoint(run), yaml.safe_dump(content))
    export.main([str(run), "--to", "published", str(tmp_path / "out.pt")])
    published_code(request, "answer", tmp_path / "out.pt", tmp_path / "answers")
    compare(load_for_inference(run, dtype=torch.float64)[1], torch.load(tmp_path / "answers"), torch.float64)
