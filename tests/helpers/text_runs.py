"""A small dataset of real text with its tokenizer, and configs of runs on it, for tests that need both."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from text_helpers import numbered_documents, train, write_jsonl

VOCABULARY = 400


def write_text(folder: Path) -> Path:
    """Write the datasets ``train`` and ``valid`` of 400 ids in ``folder``, and return it."""
    tokenizer = train(folder, "huggingface", VOCABULARY)
    preprocess = importlib.import_module("megachiar.cli.preprocess")
    for name, documents in (("train", numbered_documents(120)), ("valid", numbered_documents(140)[120:])):
        source = write_jsonl(folder / f"{name}.jsonl", documents)
        arguments = ("--input", source, "--tokenizer", tokenizer, "--output-prefix", folder / name, "--append-eod")
        preprocess.main([*map(str, arguments), "--workers", "1"])
    return folder


def text_config(data: Path, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a config that trains a small model on ``write_text``; ``sections`` update the section of their name."""
    config: dict[str, Any] = {
        "model": {
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "vocab_size": VOCABULARY,
            "max_sequence_length": 64,
            "router": {"tau": 0.79},
            "dropout": 0.1,
        },
        "data": {"train": [{"path": str(data / "train")}], "validation": {"valid": str(data / "valid")}},
        "parallel": {"zero_stage": 1},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "constant"},
        "training": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "threads": 1, "evaluate_every": 3},
        "logging": {"folder": str(run), "every": 1, "tensorboard": False},
    }
    for name, section in sections.items():
        config.setdefault(name, {}).update(section)
    return config
