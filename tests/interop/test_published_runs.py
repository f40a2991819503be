"""An imported run is a run: it is read by every command, trains further in any layout, and is imported only once."""

from __future__ import annotations

import importlib
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from indexed_oracle import make_manifest
from published_files import PERPLEXITY, STEP, TAU, options_of, published_content, published_tensors, save
from support import forked_python, pretrain, python, write_config, write_tokens

from megachiar.checkpoint.reading import locate_checkpoint, read_weights
from megachiar.config import load_config
from megachiar.data.sampling.examples import LabelledSource
from megachiar.data.storage.labels import write_labels
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError
from megachiar.inference.loading import load_for_inference
from megachiar.training.metrics import read_metrics
from megachiar.training.run_data import open_data

import_ = importlib.import_module("megachiar.cli.import_")


def command(*arguments: object, code: int = 0) -> str:
    done = forked_python("-m", "megachiar", *map(str, arguments))
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs of some kinds whose embedding is padded to 16 rows, and the datasets ``train`` and ``examples``."""
    folder = tmp_path_factory.mktemp("imported")
    write_tokens(folder / "train", vocab_size=13)
    write_examples(folder / "examples", 24)
    for kind in ("threshold", "baseline", "classifier"):
        file = save(folder / f"{kind}.pt", published_content(kind))
        command("import", file, "--output", folder / kind, "--vocab-size", 16, *options_of(kind))
    return folder


def write_examples(prefix: Path, examples: int) -> None:
    """Write labelled examples of 5 to 12 tokens in the 5 classes of the recorded classifiers."""
    rng = np.random.default_rng(0)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(examples):
            builder.add_document(rng.integers(0, 13, rng.integers(5, 13)).astype(np.uint16))
    make_manifest(prefix, append_eod=False, vocab_size=13)
    write_labels(prefix, rng.integers(0, 5, examples), tuple("abcde"))


def published_classes(folder: Path, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (B, 12) and labels (B,) of examples, filled up with token 0 as the published data is."""
    source = LabelledSource(folder / "examples", 5)
    rows = np.zeros((len(numbers), 13), np.int64)
    for row, number in zip(rows, numbers, strict=True):
        source.read_example(number, row)
    rows = torch.from_numpy(rows)
    return rows[:, :-1].clamp_min(0), rows[:, -1]


def test_evaluate_reads_a_classifier(folder):
    """All examples at once, since the gate averages over a batch."""
    words = ("--data", folder / "examples", "--batch-size", 24, "--json")
    found = json.loads(command("evaluate", folder / "classifier", *words))
    tokens, labels = published_classes(folder, range(24))
    _, model, _ = load_for_inference(folder / "classifier", dtype=torch.float64)
    with torch.no_grad():
        logits = model(tokens, head="main").logits
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5) and found["examples"] == 24
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())


def test_evaluate_reads_it(folder):
    """One window at a time, since the gate averages over all windows of a batch."""
    words = ("--data", folder / "train", "--batch-size", 1, "--json")
    found = json.loads(command("evaluate", folder / "threshold", *words))
    _, model, _ = load_for_inference(folder / "threshold", dtype=torch.float64)
    tokens, nats, count = torch.from_numpy(np.asarray(IndexedDataset(folder / "train").tokens, np.int64)), 0.0, 0
    for start in range(0, len(tokens) - 1, 12):
        window = tokens[start : start + 13]
        with torch.no_grad():
            probabilities = torch.softmax(model(window[None, :-1]).logits[0], -1)
        nats -= probabilities[torch.arange(len(window) - 1), window[1:]].log().sum().item()
        count += len(window) - 1
    assert (found["step"], found["tokens"]) == (STEP, count)
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["threshold", "baseline"])
def test_checkpoint_lists_verifies_and_shows_it(kind, folder):
    assert f"imported from {kind}.pt" in command("checkpoint", "list", folder / kind)
    assert "whole" in command("checkpoint", "verify", folder / kind)
    shown = command("checkpoint", "show", folder / kind)
    assert "embedding.weight" in shown and "16 x 16" in shown and f"step: {STEP}" in shown


@pytest.mark.parametrize("kind", ["threshold", "baseline"])
def test_calibrate_measures_it(kind, folder):
    found = json.loads(command("calibrate", folder / kind, "--data", folder / "train", "--json"))
    assert 0 < found["router"]["tau"] < 1
    if kind == "threshold":
        done = command(
            "import", folder / f"{kind}.pt", "--output", folder / "measured", "--calibrate", folder / "train"
        )
        model = load_for_inference(folder / "measured")[0].model
        assert model.router.tau == found["router"]["tau"] and f"tau {model.router.tau:g}" in done


def test_generate_continues_text_with_the_tokenizer_that_was_given(tmp_path):
    """The tokenizer needs more ids than the recorded model has, so that the embedding is padded for it."""
    text = tmp_path / "text.txt"
    text.write_text("the moon and the sun go round in the night of a day when all men sleep\n" * 20)
    command("tokenizer", "--input", text, "--vocab-size", 280, "--output", tmp_path / "tokenizer.model")
    file = save(tmp_path / "threshold.pt", published_content("threshold"))
    options = ("--tokenizer", tmp_path / "tokenizer.model", *TAU)
    message = command("import", file, "--output", tmp_path / "run", *options, code=2)
    assert "280 ids, and the embedding of" in message and not (tmp_path / "run").exists()
    command("import", file, "--output", tmp_path / "run", *options, "--vocab-size", 280)
    (tmp_path / "tokenizer.model").unlink()
    assert command("generate", tmp_path / "run", "--prompt", "the moon", "--max-new-tokens", 20).startswith("the moon")
    shown = command("export", tmp_path / "run", "--to", "published", tmp_path / "out.pt", "--vocab-size", 200, code=2)
    assert "the run's tokenizer has 280 ids" in shown


def further(folder: Path, kind: str, **parallel: Any) -> dict[str, Any]:
    """Return a config that trains an imported run further; its base is the imported run's own config."""
    data = folder / ("examples" if kind == "classifier" else "train")
    return {
        "base": str(folder / kind / "config.yaml"),
        "model": {"dropout": 0.0},
        "data": {"train": [{"path": str(data)}]},
        "parallel": parallel,
        "training": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "threads": 1},
        "checkpoint": {"load_from": str(folder / kind)},
        "logging": {"folder": str(folder / f"further_{kind}"), "every": 1, "tensorboard": False},
    }


LAYOUTS = [
    ("threshold", 1, {}),
    ("threshold", 2, {"tensor_size": 2, "sequence": True}),
    ("threshold", 2, {"pipeline_size": 2}),
    ("baseline", 2, {"zero_stage": 3}),
    ("classifier", 2, {"tensor_size": 2}),
]


@pytest.mark.parametrize(("kind", "ranks", "parallel"), LAYOUTS)
def test_another_run_starts_from_its_weights_in_any_layout(kind, ranks, parallel, folder):
    shutil.rmtree(folder / f"further_{kind}", ignore_errors=True)
    config = write_config(folder / "further.yaml", further(folder, kind, **parallel))
    output = pretrain(config, ranks=ranks)[0]
    assert f"weights from {folder / kind}" in output
    samples = torch.from_numpy(open_data(load_config(config)).training.batch(range(8)))
    _, model, _ = load_for_inference(folder / kind)
    losses = []
    for part in samples.split(2):  # the gate averages over a micro-batch
        targets, head = (part[:, -1], "main") if kind == "classifier" else (part[:, 1:], None)
        with torch.no_grad():
            losses.append(model(part[:, :-1], targets, head=head).loss.item())
    first = read_metrics(folder / f"further_{kind}", "train")[0]
    assert first["step"] == 1 and first["loss"] == pytest.approx(sum(losses) / 4, rel=2e-6)


def test_no_run_goes_on_from_it_as_if_it_had_an_optimizer(folder):
    shutil.rmtree(folder / "further_baseline", ignore_errors=True)  # another test's run would be resumed
    config = further(folder, "baseline")
    config["checkpoint"]["load"] = "all"
    config["training"]["steps"] = STEP + 1
    output = pretrain(write_config(folder / "all.yaml", config), codes=(2,))[0]
    assert "holds weights alone (imported from baseline.pt)" in output and "set checkpoint.load to weights" in output
    own = ("training.steps=701", f"data.train=[{{path: {folder / 'train'}}}]")
    output = pretrain(folder / "baseline" / "config.yaml", *own, codes=(2,))[0]
    assert "holds weights alone" in output and "start a new run in another logging.folder" in " ".join(output.split())
    shown = command("pretrain", "--config", folder / "baseline" / "config.yaml", "--dry-run", code=2)
    assert "holds weights alone" in shown


def test_the_same_import_does_nothing_and_another_one_is_refused(tmp_path, capsys):
    file, run = save(tmp_path / "file.pt", published_content("threshold")), tmp_path / "run"
    words = [str(file), "--output", str(run), *TAU]
    import_.main(words)
    first = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    import_.main([*words, "--json"])
    again = json.loads(capsys.readouterr().out)
    assert not again["written"] and again["checkpoint"] in first and again["perplexity"] == PERPLEXITY
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match=r"holds another import: it was made with tau 0.78, this command has 0.5"):
        import_.main([*words[:3], "--tau", "0.5"])
    save(file, published_content("soft"))
    with pytest.raises(UserError, match="holds another import: it was made with file"):
        import_.main(words[:3])


@pytest.mark.parametrize("lost", ["checkpoints", "config.yaml checkpoints", "everything but the note's temporary file"])
def test_an_import_that_was_killed_is_finished(lost, tmp_path):
    file, run = save(tmp_path / "file.pt", published_content("threshold")), tmp_path / "run"
    words = [str(file), "--output", str(run), *TAU]
    import_.main(words)
    weights = read_weights(locate_checkpoint(run))
    if lost.startswith("everything"):
        shutil.rmtree(run)
        run.mkdir()
        (run / "imported.json.tmp").write_text("{")
    else:
        for name in lost.split():
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if lost == "checkpoints":
        (run / "checkpoints" / "step_00000700.incomplete").mkdir(parents=True)
    import_.main(words)
    found = read_weights(locate_checkpoint(run))
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000700"]


def test_an_export_that_is_there_stays_and_another_file_is_not_replaced(folder, tmp_path):
    words = ("export", folder / "threshold", "--to", "published")
    assert f"wrote {tmp_path / 'a.pt'}, step {STEP}" in command(*words, tmp_path / "a.pt", "--vocab-size", 13)
    before = (tmp_path / "a.pt").stat().st_mtime_ns
    assert "nothing was done" in command(*words, tmp_path / "a.pt", "--vocab-size", 13)
    assert (tmp_path / "a.pt").stat().st_mtime_ns == before
    assert "exists already, with another content" in command(*words, tmp_path / "a.pt", code=2)
    assert "at most 16" in command(*words, tmp_path / "b.pt", "--vocab-size", 17, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(content["model"]["norm.weight"], published_tensors("threshold")["norm.weight"])


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from megachiar.cli.main import start
start()
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on the size of files here")
@pytest.mark.parametrize("action", ["import", "export"])
def test_a_disk_that_is_full_is_one_message(action, folder, tmp_path):
    words = {
        "import": ("import", folder / "baseline.pt", "--output", tmp_path / "run"),
        "export": ("export", folder / "baseline", "--to", "published", tmp_path / "out.pt"),
    }[action]
    done = python("-c", FULL_DISK, *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: " in done.stderr and "cannot write: File too large" in done.stderr
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert all(name in ("run/imported.json", "run/config.yaml") for name in left)
