"""The commands of docs/ make the data of configs/400m_mixed.yaml and configs/published, which take them whole.

Small stand-ins take the place of what needs a network: GPT-2's tokenizer, WikiText and the reviews.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import page_commands
from support import ROOT, process_environment

from megachiar.data.storage.labels import read_labels
from megachiar.data.storage.manifest import read_manifest
from megachiar.data.storage.reader import IndexedDataset

PARTS = ("train", "valid", "test")
WORDS = ("the", "old", "lamp", "burned", "[MAX", "[MIN", "[MED", "[SM", "]", "]", "4", "7")
SHRUNKEN = [
    *("model.num_layers=3", "model.hidden_size=32", "model.num_attention_heads=2", "model.router.tau=0.8"),
    *("training.steps=2", "training.global_batch_size=8", "training.micro_batch_size=4", "precision.compute=fp32"),
    *("mixed.probability=1", "mixed.group_size=4", "schedule.warmup_steps=1", "logging.every=1"),
    *(f"mixed.tasks.{task}.global_batch_size=4" for task in ("wikitext-2", "imdb", "listops")),
]


def commands() -> list[str]:
    return page_commands("tasks.md", "### The data of configs/400m_mixed.yaml")


def write_texts(folder: Path) -> None:
    """Write what stands for WikiText, and reviews of 400 words, which are longer than the model reads."""
    rng = random.Random(1)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    for text in ("wikitext-103", "wikitext-2"):
        (folder / "data" / text).mkdir(parents=True)
        for part in PARTS:
            lines = [json.dumps({"text": words(200)}) + "\n" for _ in range(20)]
            (folder / "data" / text / f"{part}.jsonl").write_text("".join(lines))
    for part in ("train", "test"):
        for label in ("neg", "pos"):
            reviews = folder / "aclImdb" / part / label
            reviews.mkdir(parents=True)
            for number in range(40):
                (reviews / f"{number}_7.txt").write_text(words(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the commands of both pages have been run."""
    folder = tmp_path_factory.mktemp("mixed")
    write_texts(folder)
    run(
        folder,
        ["tokenizer", "--input", "data/wikitext-103/train.jsonl", "--vocab-size", "280", "--output", "gpt2.json"],
    )
    for command in (*commands(), *page_commands("reproducing.md", "## Data")):
        words = command.split()
        if words[0] != "megachiar" or words[1:3] == ["corpus", "--source"] or words[1] == "pretrain":
            continue
        words = [word if word != "hf:openai-community/gpt2" else "gpt2.json" for word in words[1:]]
        if words[:2] == ["corpus", "imdb"]:
            words += ["--from", "aclImdb"]
        if words[:2] in (["corpus", "listops"], ["corpus", "listops-flat"]):
            words += ["--train", "80", "--valid", "20", "--test", "20"]
        run(folder, words)
    return folder


def run(folder: Path, words: list[str]) -> str:
    environment = process_environment(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "megachiar", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return " ".join((done.stdout + done.stderr).split())


def test_no_example_is_longer_than_the_config_reads(folder):
    for name, classes in (("imdb", ("neg", "pos")), ("listops", tuple("0123456789"))):
        for part in ("train", "valid"):
            prefix = folder / "data" / "mixed" / name / part
            dataset = IndexedDataset(prefix)
            assert max(dataset.lengths) <= 256
            assert read_labels(prefix, read_manifest(prefix), dataset.documents).classes == classes
    lists = (folder / "data" / "mixed" / "listops" / "train.jsonl").read_text().splitlines()
    assert all(16 < len(json.loads(line)["text"].split()) < 128 for line in lists)


def test_the_config_takes_the_data_whole_and_trains_on_them(folder):
    config = ["pretrain", "--config", str(ROOT / "configs" / "400m_mixed.yaml")]
    assert "megachiar pretrain --config configs/400m_mixed.yaml --dry-run" in commands()
    for words in ([*config, "--dry-run"], [*config, "--set", *SHRUNKEN]):
        said = run(folder, words)
        assert "are longer than" not in said and "not on this machine" not in said
    records = [json.loads(line) for line in (folder / "runs" / "400m_mixed" / "metrics.jsonl").read_text().splitlines()]
    kinds = {record["kind"] for record in records}
    assert {"train", "evaluation/imdb", "evaluation/listops", "evaluation/wikitext-2"} <= kinds


@pytest.mark.parametrize("name", ["mixed", "imdb", "listops", "wikitext-2", "400m"])
def test_the_published_configs_take_their_data_whole(name, folder):
    said = run(folder, ["pretrain", "--config", str(ROOT / "configs" / "published" / f"{name}.yaml"), "--dry-run"])
    assert "are longer than" not in said and "not on this machine" not in said
