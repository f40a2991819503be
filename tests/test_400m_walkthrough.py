"""The walk-through of docs/reproducing.md, command by command, from the hub to a run that is evaluated.

What comes over the network there comes from stand-ins of the same formats here: a hub on this machine, and a module in
place of `datasets`. The model has fewer layers.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from local_hub import COMMIT, serve_hub
from support import ROOT
from text_helpers import numbered_documents, train

from megachiar.data.storage.manifest import read_manifest
from megachiar.data.storage.reader import IndexedDataset

STAND_IN = """
from pathlib import Path

def load_dataset(name, config):
    assert (name, config) == ("Salesforce/wikitext", "wikitext-103-raw-v1")
    texts = Path(__file__).with_name("articles.txt").read_text().splitlines()
    rows = [{"text": line} for n, text in enumerate(texts) for line in (f" = Title {n} = \\n", "", f" {text} \\n")]
    return {"train": rows[:240], "validation": rows[240:270], "test": rows[270:300]}
"""
SMALLER = [
    *("model.num_layers=3", "model.hidden_size=32", "model.num_attention_heads=2", "model.max_sequence_length=32"),
    *("data.sequence_length=32", "training.epochs=null", "training.steps=2", "training.global_batch_size=2"),
    *("training.micro_batch_size=1", "schedule.warmup_steps=1", "precision.compute=fp32"),
]


def commands(heading: str) -> list[list[str]]:
    """The commands of ours in the first block of shell after a heading of the page, but installation."""
    page = (ROOT / "docs" / "reproducing.md").read_text().split(f"\n## {heading}\n")[1]
    block = re.search(r"```bash\n(.*?)```", page, re.S)[1].replace("\\\n", " ")
    return [shlex.split(line) for line in block.splitlines() if line.startswith("megachiar ")]


@pytest.mark.timeout(900)
def test_the_walk_through_ends_with_an_evaluated_run(tmp_path):
    (tmp_path / "stand_ins" / "datasets").mkdir(parents=True)
    (tmp_path / "stand_ins" / "datasets" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "stand_ins" / "datasets" / "articles.txt").write_text("\n".join(numbered_documents(100)))
    vocabulary = train(tmp_path, "huggingface").read_bytes()
    with serve_hub() as hub:
        hub.add("openai-community/gpt2", {"tokenizer.json": vocabulary, "tokenizer_config.json": b'{"x": 1024}'})
        environment = {
            **os.environ,
            "PYTHONPATH": str(tmp_path / "stand_ins"),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "OMP_NUM_THREADS": "1",
        }

        def run(*arguments: str) -> str:
            command = [sys.executable, "-m", "megachiar", *arguments]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        prepare = commands("Data")
        assert [command[1] for command in prepare] == ["corpus", "preprocess", "preprocess", "preprocess"]
        for _, *arguments in prepare:
            run(*arguments)
        check_datasets(tmp_path / "data" / "wikitext-103", vocabulary)
        config = str(ROOT / "configs" / "400m.yaml")
        run("pretrain", "--config", config, "--set", *SMALLER)
        evaluations = [command for command in commands("Train and evaluate") if "runs/400m" in command]
        assert evaluations
        for _, *arguments in evaluations:
            assert "data/wikitext-103/test" in run(*arguments)
    assert (tmp_path / "runs" / "400m" / "tokenizer" / "tokenizer.json").read_bytes() == vocabulary


def check_datasets(folder: Path, vocabulary: bytes) -> None:
    """Each part has the tokens of its articles, and the commit of the tokenizer."""
    library = tokenizers.Tokenizer.from_str(vocabulary.decode())
    texts = numbered_documents(100)
    for part, numbers in {"train": range(80), "valid": range(80, 90), "test": range(90, 100)}.items():
        dataset = IndexedDataset(folder / part)
        articles = [f" = Title {number} = \n\n {texts[number]} \n" for number in numbers]
        assert [dataset[n].tolist() for n in range(len(dataset))] == [[*library.encode(a).ids, 0] for a in articles]
        assert read_manifest(folder / part).tokenizer.hub == f"hf:openai-community/gpt2@{COMMIT}"
