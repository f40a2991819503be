"""What a finished (or running) run is read for: its tokenizer, its loss on a text, its samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megachiar.config import RunConfig
from megachiar.data.sampling.dataset import TokenSource, ValidationSet
from megachiar.data.sampling.document_end import why_unmasked
from megachiar.data.storage.files import manifest_path
from megachiar.errors import UserError
from megachiar.inference.generation import generate
from megachiar.model import ChiarFormer
from megachiar.training.evaluation import Score
from megachiar.training.run_tokenizer import record_of_run, run_tokenizer


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_readable(checkpoint: Path, config: RunConfig, source: TokenSource) -> None:
    """Check that a run's numbers on a dataset mean something: its ids are the run's, and documents are kept apart.

    Raises:
        UserError: the dataset was made with another tokenizer, or the run keeps to documents and cannot tell these.
    """
    recorded, manifest = record_of_run(checkpoint, config), source.manifest
    if recorded is not None and manifest is not None and manifest.tokenizer.fingerprint != recorded.fingerprint:
        raise UserError(
            manifest_path(source.prefix),
            f"made with tokenizer {manifest.tokenizer.file} ({manifest.tokenizer.fingerprint}), but {checkpoint} was "
            f"trained with {recorded.file} ({recorded.fingerprint}): the ids mean other tokens",
            "preprocess the text with the run's tokenizer",
        )
    if config.document_end is not None:
        reason = why_unmasked(source, config.document_end, is_stated=True)
        if reason is not None:
            raise UserError(
                source.prefix,
                f"the run keeps attention to documents that end with id {config.document_end}, but {reason}",
                "preprocess the text as the run's own data, with --append-eod",
            )


def open_for_run(
    checkpoint: Path, config: RunConfig, prefix: Path | str, sequence_length: int | None = None
) -> ValidationSet:
    """Open a dataset that the run of ``checkpoint`` can score, in windows of the run's length if none is given.

    Raises:
        UserError: as ``ValidationSet`` and ``check_readable``.
    """
    dataset = ValidationSet(prefix, sequence_length or config.sequence_length, vocab_size=config.model.vocab_size)
    check_readable(checkpoint, config, dataset.source)
    return dataset


class TextSampler:
    """Continue text with the model of a run: prompt in, text out.

    Attributes:
        tokenizer: of the run.
        end: id that ends a text, and that an empty prompt is taken for; None where nothing names one.
    """

    def __init__(self, checkpoint: Path, config: RunConfig, model: ChiarFormer):
        self.tokenizer = run_tokenizer(checkpoint, config)
        # Where attention keeps to documents, what ends them for the model is in its config.
        self.end = self.tokenizer.eod_id if config.document_end is None else config.document_end
        self._model = model
        self._known = torch.zeros(config.model.vocab_size, dtype=torch.bool)
        self._known[list(self.tokenizer.known_ids())] = True

    def __call__(self, prompt: str, max_new_tokens: int, **sampling: object) -> tuple[str, list[int]]:
        """Return ``prompt`` with what follows it, and the new ids; ``sampling`` is as ``generate`` takes it.

        Raises:
            UserError: the prompt is empty and nothing names the token that ends a document.
        """
        ids = list(self.tokenizer.encode(prompt))
        if not ids and self.end is None:
            raise UserError("--prompt", "is empty and the tokenizer has no end-of-document token", "give some text")
        begin = ids or [self.end]
        new = generate(self._model, begin, max_new_tokens, eod_id=self.end, known_ids=self._known, **sampling)
        return self.tokenizer.decode([*ids, *new]), new


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
