"""What reads a run afterwards: evaluation and sampling, with no flags but the run folder."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import forked_python, pretrain, run_command, small_config, write_config

from megachiar.checkpoint.format import complete_checkpoints
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.inference.loading import load_for_inference
from megachiar.training.metrics import read_metrics

TEXT = "the moon and the sun go round in the night of a day when all men sleep but one who counts the stars"
WORDS = TEXT.split()


def write_corpus(path: Path, documents: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    texts = (" ".join(rng.choice(WORDS, rng.integers(20, 60))) + ".\n" for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tool(name: str, *arguments: object, code: int = 0) -> str:
    done = forked_python(f"tools/{name}.py", *arguments)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of a small model, made with the tools as a user would."""
    folder = tmp_path_factory.mktemp("run")
    for name, documents in (("train", 60), ("valid", 8), ("test", 8)):
        corpus = write_corpus(folder / f"{name}.jsonl", documents, seed=documents + len(name))
        if name == "train":
            tool("train_tokenizer", "--input", corpus, "--vocab-size", 320, "--output", folder / "tokenizer.model")
        tool(
            "preprocess_data",
            *("--input", corpus, "--tokenizer", folder / "tokenizer.model"),
            *("--append-eod", "--workers", 1, "--output-prefix", folder / name),
        )
    config = small_config(folder, training={"steps": 30}, checkpoint={"every": 15})
    config["model"] |= {"vocab_size": 320}
    config["logging"] |= {"tensorboard": True, "every": 5}
    pretrain(write_config(folder / "config.yaml", config))
    return folder


def independent_nats(folder: Path, prefix: Path) -> tuple[float, int]:
    """Cross-entropy of the run on ``prefix`` from plain logits in float64, window by window."""
    _, model, _ = load_for_inference(folder / "run", dtype=torch.float64)
    tokens = np.asarray(IndexedDataset(prefix).tokens, np.int64)
    nats, count = 0.0, 0
    for start in range(0, len(tokens) - 1, 32):
        window = torch.from_numpy(tokens[start : start + 33])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        probabilities = torch.softmax(logits, -1)[torch.arange(len(window) - 1), window[1:]]
        nats -= probabilities.log().sum().item()
        count += len(window) - 1
    return nats, count


def test_evaluate_agrees_with_plain_logits(folder):
    found = json.loads(tool("evaluate", folder / "run", "--data", folder / "test", "--json"))
    nats, count = independent_nats(folder, folder / "test")
    texts = [json.loads(line)["text"] for line in (folder / "test.jsonl").read_text().splitlines()]
    assert found["tokens"] == count and found["complete"] and found["step"] == 30
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["token_ppl"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found["word_ppl"] == pytest.approx(math.exp(nats / sum(len(t.split()) for t in texts)), rel=1e-3)
    text_bytes = sum(len(t.encode()) for t in texts)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_evaluate_reads_the_runs_own_validation_sets(folder):
    logged = read_metrics(folder / "run", "evaluation/valid")[-1]
    found = json.loads(tool("evaluate", folder / "run", "--json"))
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert "valid" in tool("evaluate", folder / "run")


def test_an_older_checkpoint_can_be_named(folder):
    older = complete_checkpoints(folder / "run" / "checkpoints")[0]
    assert json.loads(tool("evaluate", older, "--json"))["step"] == 15


def test_samples_are_a_function_of_the_seed(folder):
    arguments = (folder / "run", "--prompt", "the moon and", "--max-new-tokens", 20)
    first = tool("generate", *arguments, "--seed", 1)
    assert first.startswith("the moon and")
    assert tool("generate", *arguments, "--seed", 1) == first
    assert tool("generate", *arguments, "--seed", 2) != first
    several = [json.loads(line) for line in tool("generate", *arguments, "--num-samples", 2, "--json").splitlines()]
    assert [s["seed"] for s in several] == [0, 1] and several[1]["text"] + "\n" == first


def test_greedy_sampling_takes_the_likeliest_token(folder):
    text = tool("generate", folder / "run", "--prompt", "the moon", "--temperature", 0, "--max-new-tokens", 6)
    _, model, _ = load_for_inference(folder / "run")
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    ids = tokenizer.encode("the moon")
    for _ in range(6):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eod_id:
            break
        ids.append(token)
    assert text == tokenizer.decode(ids) + "\n"


def test_a_run_can_be_sampled_from_far_from_its_data(folder, tmp_path):
    """The run folder alone is enough: it is copied, and data and tokenizer are out of reach."""
    shutil.copytree(folder / "run", tmp_path / "moved")
    away = folder.rename(folder.with_name(folder.name + "-away"))
    try:
        assert tool("generate", tmp_path / "moved", "--prompt", "the", "--max-new-tokens", 3).startswith("the")
    finally:
        away.rename(folder)


def test_a_prompt_may_come_from_standard_input_or_be_empty(folder):
    done = run_command(
        "sh", "-c", f"echo 'the sun' | {sys.executable} tools/generate.py {folder}/run --prompt - --max-new-tokens 2"
    )
    assert done.returncode == 0 and done.stdout.startswith("the sun"), done.stderr
    assert tool("generate", folder / "run", "--max-new-tokens", 4)


def test_tensorboard_has_the_curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "gate", "attention_share", "entropy", "val/loss", "val/ppl"} <= set(tags["scalars"])
    assert {"attention_share/layers", "entropy/layers"} <= set(tags["histograms"])
    logged = {r["step"]: r["mean_loss"] for r in read_metrics(folder / "run", "train")}
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(logged, rel=1e-6)


def test_metrics_hold_what_the_readme_promises(folder):
    record = read_metrics(folder / "run", "train")[-1]
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes", "data_wait_share"} <= set(
        record
    )
    assert len(record["attention_share"]) == len(record["entropy"]) == 4
    assert record["attention_share"][0] == 0 and record["attention_share"][3] == 1
    assert record["entropy"][0] is None and 0 < record["entropy"][1] < 1
    assert 0 < record["gate"] < 1 and record["model_flops_utilisation"] is None


REFUSED = [
    ("evaluate", ["{folder}/nothing"], "no such folder"),
    ("evaluate", ["{folder}"], "holds no checkpoint"),
    ("evaluate", ["{folder}/run", "--data", "{folder}/nothing"], "nothing.idx"),
    ("evaluate", ["{folder}/run", "--sequence-length", "33"], "--sequence-length 33: is above"),
    ("generate", ["{folder}/run", "--temperature", "-1"], "--temperature: -1"),
    ("generate", ["{folder}/run", "--top-p", "0"], "--top-p: 0 is not"),
    ("generate", ["{folder}/run", "--top-k", "0"], "--top-k: 0 is not"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_bad_arguments_get_one_message(folder, name, arguments, message):
    assert message in tool(name, *(a.format(folder=folder) for a in arguments), code=2)


def test_a_gate_that_sees_the_future_has_the_text_read_anew_for_each_token(folder, tmp_path):
    pretrain(
        folder / "config.yaml",
        "training.steps=3",
        "model.meta_router.pool=batch",
        f"logging.folder={tmp_path}",
        "data.validation={}",
    )
    text = tool("generate", tmp_path, "--prompt", "the moon", "--temperature", 0, "--max-new-tokens", 40)
    _, model, _ = load_for_inference(tmp_path)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    ids = list(tokenizer.encode("the moon"))
    for _ in range(40):  # longer than the model's longest sequence, 32
        with torch.no_grad():
            token = int(model(torch.tensor([ids[-32:]])).logits[0, -1].argmax())
        if token == tokenizer.eod_id:
            break
        ids.append(token)
    assert len(ids) > 40 and text == tokenizer.decode(ids) + "\n"
