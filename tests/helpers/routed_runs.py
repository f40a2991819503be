"""A run of a small model that has seen text, and records of routes, for the tests of what shows routes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from model_cases import lively_model, small_model_config
from support import pretrain, small_config, write_config
from text_helpers import DOCUMENTS, numbered_documents, run_tool, train, write_jsonl

from megachiar.analysis.text_routes import TextRoutes, text_routes
from megachiar.config.model import ModelConfig
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

VOCABULARY = 400
TEXT = "Document 7: the quick brown fox jumps over 12 lazy dogs,\nwhile <b>old</b> ships sail home & rest. "


def make_run(folder: Path, *, name: str = "run", **model: Any) -> Path:
    """Train a small model on text for two steps, with a checkpoint after each, and return its run folder."""
    if not (folder / "train.bin").exists():
        tokenizer = train(folder, "sentencepiece", VOCABULARY)
        for part, count in (("train", 60), ("valid", 8)):
            corpus = write_jsonl(folder / f"{part}.jsonl", numbered_documents(count) + DOCUMENTS)
            arguments = ["--append-eod", "--workers", 1, "--output-prefix", folder / part]
            done = run_tool("preprocess_data", "--input", corpus, "--tokenizer", tokenizer, *arguments)
            assert done.returncode == 0, done.stderr
    config = small_config(folder, training={"steps": 2}, checkpoint={"every": 1, "keep": 3})
    config["model"] |= {"vocab_size": VOCABULARY} | model
    config["logging"]["folder"] = str(folder / name)
    pretrain(write_config(folder / f"{name}.yaml", config))
    return folder / name


def described_routes(folder: Path, text: str = TEXT, **model: Any) -> tuple[TextRoutes, ModelConfig, Tokenizer]:
    """Return the routes of ``text`` through an untrained model, its config, and the tokenizer, kept in ``folder``."""
    tokenizer = _tokenizer(folder)
    config = small_model_config(vocab_size=VOCABULARY, **model)
    lively = lively_model(config, dtype=torch.float32).eval()
    return text_routes(lively, tokenizer, [int(token) for token in tokenizer.encode(text)]), config, tokenizer


def record_of(routes: TextRoutes, config: ModelConfig, name: str = "runs/test") -> dict[str, Any]:
    """Return a record of routes as ``OpenRun.record`` does, of a run that has no folder."""
    header = {"run": name, "step": 3, "kind": config.kind, "parameters": 1000, "validation": {}}
    return {
        **header,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        **routes.as_dict(config),
    }


@functools.cache
def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.model"
    return load_tokenizer(path if path.exists() else train(folder, "sentencepiece", VOCABULARY))
