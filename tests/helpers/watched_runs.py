"""A small run that has seen text, stopped short and went on with another config, for the tests of what shows runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import pretrain, small_config, write_config
from text_helpers import DOCUMENTS, numbered_documents, train, write_jsonl

from megachiar.cli import preprocess

VOCABULARY = 400
FIRST, STEPS = 6, 12


def write_data(folder: Path) -> None:
    """Write a tokenizer, and datasets ``train`` and ``valid`` that it has made."""
    tokenizer = train(folder, "sentencepiece", VOCABULARY)
    for part, count in (("train", 60), ("valid", 8), ("other", 9)):
        corpus = write_jsonl(folder / f"{part}.jsonl", numbered_documents(count) + DOCUMENTS)
        common = ["--append-eod", "--workers", "1", "--output-prefix", str(folder / part)]
        preprocess.main(["--input", str(corpus), "--tokenizer", str(tokenizer), *common])


def watched_config(folder: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    """Write the config of a run of ``FIRST`` steps in ``folder / name``, and return its path."""
    training = {"steps": FIRST, "evaluate_every": 2, "micro_batch_size": 4, **sections.pop("training", {})}
    schedule = {"kind": "constant", **sections.pop("schedule", {})}
    model, logging = sections.pop("model", {}), {"page": True, **sections.pop("logging", {})}
    config = small_config(
        folder, training=training, schedule=schedule, checkpoint={"every": 3}, logging=logging, **sections
    )
    config["model"] |= {"vocab_size": VOCABULARY, **model}
    config["logging"]["folder"] = str(folder / name)
    return write_config(folder / f"{name}.yaml", config)


def make_watched_run(folder: Path) -> Path:
    """Train a run to step ``FIRST``, and on to ``STEPS`` with another learning rate; return its folder."""
    write_data(folder)
    config = watched_config(folder)
    pretrain(config)
    pretrain(config, f"training.steps={STEPS}", "optimizer.learning_rate=0.001")
    return folder / "run"


def records_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of a kind, read without the code under test."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]
