"""Five small tasks of five kinds in a folder, as YAML files of lm-evaluation-harness, made of generated text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from text_helpers import WORDS, numbered_documents

TASKS = ("which_word", "which_end", "whole_text", "last_word", "say_it")
DOCUMENTS_OF_A_TASK = 12


def harness() -> Any:
    """Return lm_eval, or skip the tests that need it."""
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megachiar[eval]'")


def write_tasks(folder: Path, documents: int = DOCUMENTS_OF_A_TASK) -> Path:
    """Write the five tasks with so many documents each, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = numbered_documents(documents)
    records = {"which_word": [], "which_end": [], "whole_text": [], "last_word": [], "say_it": []}
    for number, text in enumerate(texts):
        words = text.split()
        others = [WORDS[(number * step + 3) % len(WORDS)] for step in (1, 2, 5)]
        records["which_word"].append({"text": " ".join(words[:9]), "words": [words[9], *others], "answer": 0})
        ends = [" ".join(words[-count:]) for count in (1, 2, 4)]
        records["which_end"].append({"text": text[: 30 + number], "ends": ends, "answer": number % 3})
        records["whole_text"].append({"text": " ".join([text] * (1 + number % 4))})
        records["last_word"].append({"text": " ".join([*words[:-1] * 3, words[-1]])})
        records["say_it"].append({"text": " ".join(words[:6]), "answer": f"{words[6]} {words[7]}"})
    for name, config in _configs().items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records[name]))
        _write(folder / f"{name}.yaml", {"task": name, **_local(data), **config})
    return folder


def _local(data: Path) -> dict[str, Any]:
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}


def _write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def _metrics(*names: str, lower: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "metric_list": [{"metric": name, "higher_is_better": name not in lower} for name in names],
        "metadata": {"version": 1.0},
    }


def _configs() -> dict[str, dict[str, Any]]:
    perplexities = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return {
        "which_word": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "words",
            "doc_to_target": "answer",
            "num_fewshot": 1,
            "fewshot_split": "test",
            **_metrics("acc"),
        },
        "which_end": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "ends",
            "doc_to_target": "answer",
            **_metrics("acc", "acc_norm"),
        },
        "whole_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            **_metrics(*perplexities, lower=perplexities),
        },
        "last_word": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            **_metrics("perplexity", "acc", lower=("perplexity",)),
        },
        "say_it": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", " over"], "max_gen_toks": 12, "do_sample": False},
            **_metrics("exact_match"),
        },
    }
