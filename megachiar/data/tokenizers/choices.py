"""What a command line can say about a tokenizer; ``--help`` imports this and nothing else of the room."""

from __future__ import annotations

from typing import Literal

TokenizerKind = Literal["auto", "sentencepiece", "huggingface", "gpt2"]
"""The files that a tokenizer consists of; auto goes by their names."""

Engine = Literal["auto", "fast", "reference"]
"""What encodes text: gigatoken, the tokenizer's own library, or the faster of them that gives the same tokens."""
