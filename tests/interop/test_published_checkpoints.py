"""A published checkpoint has the published logits and routes as a run of ours, and is the same file when exported.

The published code computed the logits of ``published_files``; it is not needed here.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published_files import (
    ACCURACY,
    CLASSIFIERS,
    KINDS,
    LONG_KINDS,
    PERPLEXITY,
    STEP,
    TAU,
    long_content,
    long_record,
    options_of,
    published_content,
    published_logits,
    published_settings,
    published_tensors,
    record,
    save,
)
from support import rewrite_config

from megachiar.checkpoint.format import read_state
from megachiar.checkpoint.reading import locate_checkpoint, read_weights
from megachiar.checkpoint.weights_alone import write_weights
from megachiar.cli import export
from megachiar.config import load_config
from megachiar.errors import UserError
from megachiar.inference.loading import load_for_inference
from megachiar.interop import published_export

import_ = importlib.import_module("megachiar.cli.import_")


def imported(file: Path, *options: object) -> Path:
    """Import ``file`` beside itself and return the run folder."""
    run = file.with_suffix("")
    import_.main([str(file), "--output", str(run), *map(str, options)])
    return run


def exported(run: Path, *options: object) -> dict[str, Any]:
    """Export ``run`` beside itself and return what a script of the published code would load."""
    file = run.with_name(f"{run.name}_exported.pt")
    export.main([str(run), "--to", "published", str(file), *map(str, options)])
    return torch.load(file, weights_only=True)


@pytest.fixture
def file(tmp_path) -> Any:
    return lambda kind: save(tmp_path / f"{kind}.pt", published_content(kind))


def logits_and_routes(run: Path, dtype: torch.dtype, ids: list | None = None) -> tuple[torch.Tensor, dict[str, list]]:
    """Return logits and routes of ``ids``, or of the recorded tokens."""
    _, model, _ = load_for_inference(run, dtype=dtype)
    tokens, routes = torch.tensor(record()["tokens"] if ids is None else ids), {}
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(
                lambda _, x, decision, n=name: routes.update({n[:-7]: decision.operator.view(tokens.shape).tolist()})
            )
    with torch.no_grad():
        return model(tokens, head="main" if model.heads else None).logits, routes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_has_the_published_logits_and_routes(kind, dtype, tolerance, file):
    logits, routes = logits_and_routes(imported(file(kind), *options_of(kind)), dtype)
    expected = record()["models"][kind]
    torch.testing.assert_close(logits.double(), published_logits(kind), rtol=0, atol=tolerance)
    assert routes == expected["routes"]
    assert all(0 < torch.tensor(part).double().mean() < 1 for part in list(routes.values())[:1])


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_sequences_of_the_published_length_have_the_published_logits(kind, tmp_path):
    """In fp64 that holds with rotary tables of fp64: the published code has fp32 ones, and those alone differ."""
    run, every = imported(save(tmp_path / "long.pt", long_content(kind)), *options_of(kind)), long_record()["every"]
    expected = long_record()["models"][kind]
    exact, as_published = (
        torch.tensor(expected["logits"][name], dtype=torch.float64) for name in ("fp64", "fp64, tables of fp32")
    )
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        logits, routes = logits_and_routes(run, dtype, long_record()["tokens"])
        shown = logits[:, every - 1 :: every].double()
        torch.testing.assert_close(shown, exact, rtol=0, atol=tolerance)
        if dtype == torch.float64:
            assert 1e-9 < (shown - as_published).abs().max() < 1e-6
        found = {name: [row[every - 1 :: every] for row in rows] for name, rows in routes.items()}
        assert found == expected["routes"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_run_is_the_published_file_to_the_bit(kind, file):
    content = exported(imported(file(kind), *options_of(kind)))
    expected = published_tensors(kind)
    assert content["model"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert content["model"][name].dtype == torch.float32 and torch.equal(content["model"][name], tensor), name
    for name in ("lm_head.weight", "backbone.lm_head.weight"):
        if name in expected:
            embedding = content["model"][name.replace("lm_head", "token_emb")]
            assert content["model"][name].data_ptr() == embedding.data_ptr(), "tied weights are stored once"
    sizes = {name: content["cfg"][name] for name in record()["sizes"]}
    assert sizes == record()["sizes"] and published_settings(kind).items() <= content["cfg"].items()
    assert content["step"] == STEP
    assert content.get("val_ppl") == (None if kind in CLASSIFIERS else pytest.approx(PERPLEXITY))
    if "baseline" not in kind:
        assert content["cfg"]["use_meta_router"] == (kind != "no_gate")
    if kind == "threshold":
        assert (content["cfg"]["tau_low"] + content["cfg"]["tau_high"]) / 2 == pytest.approx(0.78, abs=1e-15)


def test_the_record_of_the_run_says_where_the_weights_come_from(file):
    run = imported(file("threshold"), *TAU)
    config, _, state = load_for_inference(run)
    assert (state.step, state.layout) == (STEP, "imported from threshold.pt") and not state.has_moments
    assert config.model.router.tau == pytest.approx(0.78) and config.model.meta_router.init == "published"
    assert json.loads((run / "imported.json").read_text())["report"]["perplexity"] == PERPLEXITY


def test_a_file_may_say_more_or_less_in_cfg(tmp_path):
    """Nothing but the tensors is needed, and all that is said is compared."""
    content = published_content("threshold")
    for name, cfg in (
        ("none", None),
        ("sizes", {**record()["sizes"], "tau_low": 0.5, "tau_high": 0.7, "device": "cuda"}),
    ):
        run = imported(save(tmp_path / f"{name}.pt", content | {"cfg": cfg}), *(TAU if cfg is None else ()))
        model = load_for_inference(run)[0].model
        assert (model.num_attention_heads, model.max_sequence_length, model.dropout) == (2, 12, 0.1)
        assert model.router.tau == pytest.approx(0.78 if cfg is None else 0.6)
    bare = imported(save(tmp_path / "bare.pt", content["model"]), *TAU)
    assert load_for_inference(bare)[2].step == 0
    assert logits_and_routes(bare, torch.float64)[1] == record()["models"]["threshold"]["routes"]


def test_without_rotary_tables_options_say_heads_and_length(tmp_path):
    tensors = {name: t for name, t in published_tensors("baseline").items() if ".rope." not in name}
    path = save(tmp_path / "baseline.pt", {"model": tensors, "step": 1})
    with pytest.raises(UserError, match=r"how many heads share its 16 channels.*\n.*--heads"):
        imported(path)
    with pytest.raises(UserError, match=r"longest sequence.*\n.*--sequence-length"):
        imported(path, "--heads", 2)
    logits, _ = logits_and_routes(imported(path, "--heads", 2, "--sequence-length", 12), torch.float64)
    expected = published_logits("baseline")
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_longer_tables_than_the_trained_length_are_kept(tmp_path):
    """The published code doubles its tables where it reads a longer sequence."""
    content = published_content("baseline")
    content["cfg"]["max_seq_len"] = 8
    config, _, _ = load_for_inference(imported(save(tmp_path / "long.pt", content)))
    assert (config.model.max_sequence_length, config.sequence_length) == (12, 8)


@pytest.mark.parametrize("base", [500.0, 1e6, 12345.0])
def test_the_base_is_told_from_the_frequencies(base, tmp_path):
    content = published_content("baseline")
    frequencies = 1.0 / (base ** (torch.arange(0, 8, 2).float() / 8))
    angles = torch.outer(torch.arange(12).float(), frequencies)
    tables = {"inv_freq": frequencies, "cos_cache": angles.cos().repeat(1, 2), "sin_cache": angles.sin().repeat(1, 2)}
    content["model"] |= {n: tables[n.rpartition(".")[2]] for n in content["model"] if ".rope." in n}
    run = imported(save(tmp_path / "base.pt", content))
    assert load_for_inference(run)[0].model.attention.rope_base == base
    assert exported(run)["cfg"]["rope_base"] == base


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types_become_fp32(dtype, tmp_path, capsys):
    content = published_content("baseline")
    content["model"] = {name: tensor.to(dtype) for name, tensor in content["model"].items()}
    run = imported(save(tmp_path / "typed.pt", content))
    weights = read_weights(locate_checkpoint(run))
    assert torch.equal(weights["embedding.weight"], content["model"]["token_emb.weight"].float())
    assert load_for_inference(run)[0].model.attention.rope_base == 10000.0
    assert ("rounded to 32" in capsys.readouterr().out) == (dtype == torch.float64)


def test_heads_of_mixed_training_are_left_out_and_named(tmp_path, capsys):
    content = published_content("threshold")
    del content["cfg"]
    heads = {f"_cls_head_imdb.{part}": torch.ones(2, 16) for part in ("weight", "bias")}
    content["model"] |= heads
    run = imported(save(tmp_path / "mixed.pt", content), *TAU)
    shown = capsys.readouterr().out
    assert all(f"left out: {name}" in shown for name in heads) and "read the mean of raw embeddings" in shown
    assert logits_and_routes(run, torch.float64)[1] == record()["models"]["threshold"]["routes"]


def test_a_learned_router_without_cfg_is_asked_for(tmp_path):
    content = published_content("hard")
    path = save(tmp_path / "hard.pt", content | {"cfg": {}})
    with pytest.raises(UserError, match=r"blend the operators.*\n.*--router soft or --router hard"):
        imported(path)
    assert (
        logits_and_routes(imported(path, "--router", "hard"), torch.float64)[1] == record()["models"]["hard"]["routes"]
    )


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_is_a_classification_run_with_the_published_head(kind, file, capsys):
    run = imported(file(kind), *options_of(kind))
    config, _, state = load_for_inference(run)
    head = (config.task.kind, config.task.classes, config.task.head, config.task.padding)
    assert head == ("classification", 5, "mlp", "counted") and state.validation == {}
    assert f"test accuracy as the file has it: {ACCURACY} %" in capsys.readouterr().out


def test_shorter_sequences_of_a_classifier_are_filled_with_token_0(file):
    """The published data has zeros there, and its classifiers read them like any token."""
    _, model, _ = load_for_inference(imported(file("classifier"), *TAU), dtype=torch.float64)
    tokens = torch.tensor(record()["tokens"])
    tokens[:, 7:] = -1
    with torch.no_grad():
        short = model(tokens, head="main").logits
        assert torch.equal(short, model(tokens.clamp_min(0), head="main").logits)
    assert not torch.allclose(short, published_logits("classifier"))


def test_padding_adds_rows_of_zeros_that_an_export_leaves_out(file):
    run = imported(file("threshold"), *TAU, "--vocab-size", 16)
    logits, routes = logits_and_routes(run, torch.float64)
    expected = published_logits("threshold")
    torch.testing.assert_close(logits[..., :13], expected, rtol=0, atol=1e-9)
    assert logits[..., 13:].eq(0).all() and routes == record()["models"]["threshold"]["routes"]
    content = exported(run, "--vocab-size", 13)
    assert torch.equal(content["model"]["token_emb.weight"], published_tensors("threshold")["token_emb.weight"])
    assert content["cfg"]["vocab_size"] == 13


def with_config(run: Path, **sections: dict[str, Any]) -> None:
    """Change keys of the config of a run's only checkpoint, whose record is written anew."""
    checkpoint = locate_checkpoint(run)
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    for section, changes in sections.items():
        config[section].update(changes)
    rewrite_config(checkpoint, yaml.safe_dump(config))


@pytest.mark.parametrize("kind", ["threshold"])
def test_another_gain_is_folded_into_the_filters_exactly(kind, file):
    run = imported(file(kind), *options_of(kind))
    dct = {"gain": 1.0, "entropy_dc_weight": 2.0, "entropy_epsilon": 1e-8}
    with_config(run, model={"dct": dct})
    logits, routes = logits_and_routes(run, torch.float64)
    content = exported(run)
    assert torch.equal(content["model"]["layers.1.dct_mix.w"] * 2, published_tensors(kind)["layers.1.dct_mix.w"])
    again = imported(save(run.with_name("again.pt"), content))
    found = logits_and_routes(again, torch.float64)
    torch.testing.assert_close(found[0], logits, rtol=0, atol=1e-12)
    assert found[1] == routes and not torch.allclose(logits, published_logits(kind))


def test_another_head_than_the_published_is_refused(file):
    run = imported(file("classifier"), *TAU)
    with_config(run, task={"kind": "classification", "classes": 5, "head": "linear", "padding": "masked"})
    with pytest.raises(
        UserError, match=r"task.head is linear \(it has mlp\); task.padding is masked \(it has counted\)"
    ):
        exported(run)


def test_heads_of_a_mixed_run_are_left_out(tmp_path, capsys):
    run = imported(save(tmp_path / "run.pt", published_content("threshold")), *TAU)
    task = {"kind": "classification", "classes": 3, "data": "x", "global_batch_size": 8}
    with_config(run, mixed={"group_size": 8, "tasks": {"imdb": task}})
    config, checkpoint = load_config(locate_checkpoint(run) / "config.yaml"), locate_checkpoint(run)
    heads = {name: torch.ones(shape) for name, shape in (("weight", (3, 16)), ("bias", (3,)))}
    weights = read_weights(checkpoint) | {f"classifiers.imdb.output.{name}": value for name, value in heads.items()}
    state = read_state(checkpoint)
    write_weights(config, weights, step=STEP, data=state.data, origin="mixed", validation={})
    assert exported(run)["model"].keys() == published_tensors("threshold").keys()
    assert "left out: the classification heads of imdb" in capsys.readouterr().out


INEXPRESSIBLE = [
    ("norm", "pre", "model.norm is pre"),
    ("norm_epsilon", 1e-6, "model.norm_epsilon is 1e-06"),
    ("dct", {"gain": 1.5, "entropy_dc_weight": 2.0, "entropy_epsilon": 1e-8}, "without rounding"),
    ("dct", {"gain": 2.0, "entropy_epsilon": 1e-8}, "model.dct.entropy_dc_weight is 1.0"),
    ("dct", {"gain": 2.0, "entropy_dc_weight": 2.0}, "model.dct.entropy_epsilon is 0.0"),
    ("router", {"kind": "threshold", "tau": [0.7, 0.8]}, "model.router.tau has several values"),
    ("router", {"kind": "random", "attention_share": 0.5}, "model.router.kind is random"),
    ("router", {"kind": "hashed", "tau": 0.78}, "model.router.kind is hashed"),
    (
        "router",
        {"operators": ["dct", "rbf", "attention"], "tau_low": 0.7, "tau_high": 0.8},
        "model.router.operators are ['dct', 'rbf', 'attention']",
    ),
    ("ffn_hidden_size", 48, "model.ffn_hidden_size is 48"),
    ("embedding_multiplier", 50.0, "model.embedding_multiplier is 50.0 (it has no such setting)"),
    ("attention", {"keys": "routed"}, "model.attention.keys is routed"),
    ("meta_router", {"pool": "causal"}, "model.meta_router.pool is causal"),
]


@pytest.mark.parametrize(("key", "value", "message"), INEXPRESSIBLE)
def test_what_the_published_model_lacks_is_refused(key, value, message, file):
    run = imported(file("threshold"), *TAU)
    with_config(run, model={key: value})
    with pytest.raises(UserError) as caught:
        exported(run)
    assert message in caught.value.problem and caught.value.remedy
    assert not run.with_name(f"{run.name}_exported.pt").exists()


def test_all_that_is_lacking_is_one_message(file):
    run = imported(file("threshold"), *TAU)
    with_config(run, model={"norm": "pre", "norm_epsilon": 1e-6})
    with pytest.raises(UserError, match=r"model.norm is pre .*; model.norm_epsilon is 1e-06"):
        exported(run)


def test_a_key_that_nobody_has_thought_of_is_refused(file, monkeypatch):
    """A key that a later version adds has to have its default, until the export decides of it."""
    run = imported(file("threshold"), *TAU)
    decided = published_export._DECIDED - {"attention.rope_base"}
    monkeypatch.setattr(published_export, "_DECIDED", decided)
    exported(run)
    run.with_name("threshold_exported.pt").unlink()
    with_config(run, model={"attention": {"rope_base": 500.0}})
    with pytest.raises(UserError, match=r"model.attention.rope_base is 500.0 \(it has no such setting\)"):
        exported(run)


def test_several_thresholds_that_are_one_are_exported(file):
    run = imported(file("threshold"), *TAU)
    with_config(run, model={"router": {"kind": "threshold", "tau": [0.78, 0.78]}})
    assert exported(run)["cfg"]["tau_low"] == 0.78
