"""The choices of options of the commands that prepare data; ``--help`` imports this and little else."""

from __future__ import annotations

from typing import Literal

TrainedKind = Literal["sentencepiece", "huggingface", "words", "bytes"]
Algorithm = Literal["bpe", "unigram"]
SUFFIXES: dict[TrainedKind, str] = {
    "sentencepiece": ".model",
    "huggingface": ".json",
    "words": ".json",
    "bytes": ".json",
}
"""Kind of a tokenizer that can be made -> suffix of its file."""

WIKITEXT = {"wikitext-103": "wikitext-103-raw-v1", "wikitext-2": "wikitext-2-raw-v1"}
"""Name of a corpus -> its name on the Hugging Face hub."""
