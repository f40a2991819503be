"""Run folders whose weights are lively, without training, for the tests of exports to Hugging Face."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import lively_model
from text_helpers import train

from megachiar.checkpoint.weights_alone import write_weights
from megachiar.config import RunConfig
from megachiar.config.load import parse_with_overrides
from megachiar.data.sampling.history import DataHistory
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.tokenizers.recorded import keep_tokenizer
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.model import build_model

VOCABULARY = 400
STEP = 7
TEXTS = ("Document 7: the quick brown fox", "jumps", "over 12 lazy dogs, while old ships sail home & rest.")


def library() -> Any:
    """Return transformers, or skip the tests that need it."""
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megachiar[hf]'")


@functools.cache
def tokenizer_file(folder: Path, kind: str) -> Path:
    """Train a tokenizer of 400 ids on a few documents, once for each folder."""
    return train(folder, kind, VOCABULARY)


def run_config(folder: Path, *, document_mask: bool = False, **sections: Any) -> RunConfig:
    """Return the config of a run of a small model in ``folder``; ``sections`` replace keys of sections."""
    mapping: dict[str, Any] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "ffn_hidden_size": 48,
            "vocab_size": VOCABULARY + 5,
            "max_sequence_length": 64,
            "router": {"tau": 0.79},
        },
        "data": {"train": [{"path": str(folder / "train")}]},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": STEP, "global_batch_size": 4, "micro_batch_size": 4},
        "logging": {"folder": str(folder)},
    }
    for name, section in sections.items():
        mapping[name] = mapping.get(name, {}) | section
    if document_mask:
        mapping["data"] |= {"document_mask": True, "document_end": 2}
    return parse_with_overrides(mapping, (), "test")


def write_run(
    folder: Path,
    tokenizer: Path | None = None,
    classes: tuple[str, ...] | None = None,
    validation: dict[str, float] | None = None,
    prepend_bos: bool = False,
    **sections: Any,
) -> Path:
    """Write a run folder with one checkpoint of lively weights, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = run_config(folder, **sections)
    weights = dict(build_model(config.model, seed=3, heads=config.heads).state_dict())
    weights |= lively_model(config.model, dtype=torch.float32).state_dict()
    for number, name in enumerate(weights):
        if name.endswith("running_threshold.value"):  # of each layer its own, as training leaves them
            weights[name] = weights[name] + 1e-3 * number
    source = SourceRecord(path=str(folder / "train"), tokens=12345, checksum=None, classes=classes)
    history = DataHistory.initial(
        [(source, 1.0)],
        sequence_length=config.sequence_length,
        global_batch_size=config.training.global_batch_size,
        seed=config.training.seed,
        order=config.sample_order,
    )
    if tokenizer is not None:
        keep_tokenizer(load_tokenizer(tokenizer, prepend_bos=prepend_bos), folder)
    (folder / "config.yaml").write_text(config.to_yaml())
    write_weights(config, weights, step=STEP, data=history, origin="a test", validation=validation or {"valid": 3.25})
    return folder
