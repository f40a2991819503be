"""The choices of options about a tokenizer; ``--help`` imports this and nothing else of the room."""

from __future__ import annotations

from typing import Literal

TokenizerKind = Literal["auto", "sentencepiece", "huggingface", "gpt2"]
"""The files that a tokenizer consists of; auto goes by their names."""

Engine = Literal["auto", "fast", "reference"]
"""Engines that encode text: gigatoken, the tokenizer's own library, or the faster one that gives the same tokens."""
