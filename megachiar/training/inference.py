"""What a finished (or running) run is read for: its tokenizer, its loss on a text, its samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megachiar.config import RunConfig
from megachiar.data.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError
from megachiar.model import ChiarFormer
from megachiar.training.evaluation import Score
from megachiar.training.sources import recorded_tokenizer


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_tokenizer(checkpoint: Path, config: RunConfig) -> Tokenizer:
    """The tokenizer of the run that wrote ``checkpoint``: its own copy, or the one its config or data names.

    Raises:
        UserError: there is none any more.
    """
    kept = checkpoint.parent.parent / "tokenizer"
    candidates = sorted(kept.iterdir()) if kept.is_dir() else []
    if len(candidates) > 1:  # the files of one tokenizer, not a folder or file
        candidates = [kept]
    if config.data.tokenizer is not None:
        candidates.append(config.data.tokenizer)
    named = recorded_tokenizer(config.data.train[0].path)
    candidates += [named] if named else []
    for candidate in candidates:
        if candidate.exists():
            return load_tokenizer(candidate)
    raise UserError(
        checkpoint, "no tokenizer of this run is to be found", f"put its file into {kept}, or set data.tokenizer"
    )


def model_score(model: ChiarFormer, device: torch.device) -> Score:
    """A ``Score`` that asks ``model`` itself, without an engine."""

    @torch.inference_mode()
    def score(inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        output = model(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
        return output.token_losses.double().sum().item(), int((targets != -100).sum())

    return score


def with_progress(score: Score, advance: Callable[[int], None]) -> Score:
    """``score`` that tells ``advance`` how many windows it has done."""

    def scored(inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        result = score(inputs, targets)
        advance(len(inputs))
        return result

    return scored
