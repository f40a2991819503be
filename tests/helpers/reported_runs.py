"""A few tiny runs of every kind, trained for the tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import pretrain, small_config, write_config
from text_helpers import DOCUMENTS, numbered_documents, train, write_jsonl

from megachiar.cli import preprocess

VOCABULARY = 400
STEPS = 6
TASKS = {
    "kinds": {"kind": "classification", "classes": 3, "global_batch_size": 8},
    "again": {"kind": "language_model", "global_batch_size": 8},
}


def make_runs(folder: Path) -> None:
    """Train, below ``folder``: two variants with two seeds and a reference, one mixed run, one classification.

    threshold/seed_1, threshold/seed_2, baseline/seed_1, baseline/seed_2, a/run (mixed), b/run (classification)
    """
    _write_data(folder)
    for seed in (1, 2):
        _train(folder, f"baseline/seed_{seed}", seed, kind="baseline")
        _train(folder, f"threshold/seed_{seed}", seed)
    of_kinds = {"data": str(folder / "kinds_train"), "validation": str(folder / "kinds_valid")}
    tasks = {"kinds": TASKS["kinds"] | of_kinds, "again": TASKS["again"] | {"data": str(folder / "wikitext-2_valid")}}
    mixed = {"probability": 0.9, "group_size": 4, "tasks": tasks}
    _train(folder, "a/run", 1, sections={"mixed": mixed}, operators=["dct", "rbf", "attention"], bounds=(0.5, 0.8))
    task = {"kind": "classification", "classes": 3}
    _train(folder, "b/run", 1, data="kinds", sections={"task": task})


def _train(
    folder: Path,
    name: str,
    seed: int,
    *,
    kind: str = "chiar",
    data: str = "wikitext-2",
    operators: Any = ("dct", "attention"),
    bounds: tuple[float, ...] = (0.79,),
    sections: dict[str, Any] | None = None,
) -> None:
    sets = {
        "train": [{"path": str(folder / f"{data}_train")}],
        "validation": {"valid": str(folder / f"{data}_valid")},
        "test": {"held": str(folder / f"{data}_test")},
    }
    config = small_config(
        folder,
        training={"steps": STEPS, "seed": seed, "evaluate_every": 2, "micro_batch_size": 4},
        checkpoint={"every": 2, "keep_best": "valid"},
        logging={"folder": str(folder / name)},
    )
    config["data"] = sets
    names = ("tau_low", "tau_high") if len(bounds) == 2 else ("tau",)
    router = {"operators": list(operators), **dict(zip(names, bounds, strict=True))}
    config["model"] |= {"vocab_size": VOCABULARY, "router": router}
    if kind == "baseline":
        config["model"] |= {"kind": kind, "router": {}}
    config |= sections or {}
    path = folder / f"{name.replace('/', '-')}.yaml"
    pretrain(write_config(path, config))


def _write_data(folder: Path) -> None:
    """Write two texts, one of them named as WikiText-2 is, and one labelled dataset, each in three parts."""
    tokenizer = train(folder, "sentencepiece", VOCABULARY)
    for part in ("train", "valid", "test"):
        texts = numbered_documents(40 if part == "train" else 6) + DOCUMENTS[:2]
        corpus = write_jsonl(folder / f"{part}.jsonl", texts)
        labelled = folder / f"labelled_{part}.jsonl"
        rows = [json.dumps({"text": text, "label": number % 3}) for number, text in enumerate(texts)]
        labelled.write_text("\n".join(rows) + "\n")
        common = ["--tokenizer", tokenizer, "--workers", 1, "--output-prefix"]
        kinds = ["--input", labelled, "--label-key", "label", "--classes", "0,1,2", *common, folder / f"kinds_{part}"]
        text = ["--input", corpus, "--append-eod", *common, folder / f"wikitext-2_{part}"]
        for arguments in (text, kinds):
            preprocess.main([str(argument) for argument in arguments])
