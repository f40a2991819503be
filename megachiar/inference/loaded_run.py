"""Read a finished or running run: check datasets against it, score texts with its model, and sample text from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from megachiar.checkpoint.format import read_state
from megachiar.config import RunConfig
from megachiar.data.sampling.dataset import TokenSource, ValidationSet
from megachiar.data.sampling.document_end import why_unmasked
from megachiar.data.sampling.examples import ExampleSet, LabelledSource
from megachiar.data.storage.files import bin_path, manifest_path
from megachiar.engine.confusion import confusion_matrix
from megachiar.errors import UserError
from megachiar.inference.generation import stream
from megachiar.inference.text_stream import TextStream
from megachiar.kernels.ignored_target import IGNORED_TARGET
from megachiar.model import ChiarFormer
from megachiar.training.classification import Classify
from megachiar.training.evaluation import Score
from megachiar.training.run_tokenizer import record_of_run, run_tokenizer


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_readable(checkpoint: Path, config: RunConfig, source: TokenSource) -> None:
    """Check that a run can be measured on a dataset: ids mean the same tokens, and documents end as in training.

    Raises:
        UserError: the dataset was made with another tokenizer, or the run was trained with ``data.document_mask`` and
            the dataset's documents do not end with its end-of-document token.
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
                "preprocess the text like the run's own data, with --append-eod",
            )


def sets_of_run(config: RunConfig) -> dict[str, tuple[Path, int]]:
    """Return prefix and number of the task of each validation set of a run, by name."""
    sets = {name: (prefix, 0) for name, prefix in config.data.validation.items()}
    for number, (name, task) in enumerate(config.mixed.tasks.items(), 1):
        if task.validation is not None:
            sets[name] = (task.validation, number)
    return sets


def task_named(config: RunConfig, name: str | None) -> int:
    """Return the number of the task of a run that a command line names; the main task's for None.

    Raises:
        UserError: the run has no such task.
    """
    names = [task.name for task in config.tasks]
    if name is None:
        return 0
    if name not in names:
        raise UserError(f"--task {name}", "the run has no such task", f"name one of {', '.join(names)}")
    return names.index(name)


def open_for_run(
    checkpoint: Path, config: RunConfig, prefix: Path | str, sequence_length: int | None = None, task: int = 0
) -> ValidationSet | ExampleSet:
    """Open a dataset that the run of ``checkpoint`` can score.

    Args:
        checkpoint: of the run.
        config: of the run.
        prefix: path of the dataset without ``.bin``.
        sequence_length: tokens of a window; None takes the run's.
        task: number of the run's task that scores it.

    Raises:
        UserError: as ``ValidationSet``, ``LabelledSource`` and ``check_readable``.
    """
    if config.tasks[task].head is None:
        return open_text_for_run(checkpoint, config, prefix, sequence_length)
    return _open_examples(checkpoint, config, prefix, sequence_length, task)


def _open_examples(
    checkpoint: Path, config: RunConfig, prefix: Path | str, sequence_length: int | None = None, task: int = 0
) -> ExampleSet:
    """Open a labelled dataset for a task that is a classification, see ``open_for_run``."""
    head = config.tasks[task].head
    assert head is not None, "the task is a classification"
    source = LabelledSource(prefix, head.classes, config.model.vocab_size)
    check_readable(checkpoint, config, source)
    check_classes(checkpoint, config, source, task)
    return ExampleSet(source, sequence_length or config.sequence_length, task)


def open_tokens_for_run(checkpoint: Path, config: RunConfig, prefix: Path | str) -> TokenSource | ExampleSet:
    """Open a dataset whose tokens are counted: a text of any length, or the examples of a classification.

    Raises:
        UserError: as ``open_for_run``.
    """
    if config.tasks[0].head is not None:
        return _open_examples(checkpoint, config, prefix)
    source = TokenSource(prefix, config.model.vocab_size)
    check_readable(checkpoint, config, source)
    return source


def check_classes(checkpoint: Path, config: RunConfig, source: LabelledSource, task: int) -> None:
    """Check that a class has the number that it had in the data which the run has learned from.

    Records of earlier versions have no names of classes: nothing is checked then.

    Raises:
        UserError: the dataset names other classes, or the same ones in another order.
    """
    learned = read_state(checkpoint).classes_of(config.tasks[task].name)
    if learned is None or learned == tuple(source.classes):
        return
    names = ",".join(learned)
    raise UserError(
        bin_path(source.prefix),
        f"has the classes {', '.join(source.classes)}, but {checkpoint} has learned {', '.join(learned)} in this order",
        f"preprocess it with `--classes-from` the run's training data, or with `--classes {names}`",
    )


def open_text_for_run(
    checkpoint: Path, config: RunConfig, prefix: Path | str, sequence_length: int | None = None
) -> ValidationSet:
    """Open a dataset as one text that the model of a run can read; of a labelled one the labels are not read.

    Arguments and errors are those of ``open_for_run``.
    """
    dataset = ValidationSet(prefix, sequence_length or config.sequence_length, vocab_size=config.model.vocab_size)
    check_readable(checkpoint, config, dataset.source)
    return dataset


class TextSampler:
    """Continue text with the model of a run.

    Attributes:
        tokenizer: of the run.
        end: id that ends a text, and that replaces an empty prompt; None if nothing names such a token.
        known: ids that the tokenizer has, bool (V,).

    Raises:
        UserError: the run is no language model, or its tokenizer is missing or was replaced by another one.
    """

    def __init__(self, checkpoint: Path, config: RunConfig, model: ChiarFormer):
        if config.tasks[0].head is not None:
            raise UserError(checkpoint, "learns classes, so that it cannot continue a text", "name a language model")
        self.tokenizer = run_tokenizer(checkpoint, config)
        # A run with data.document_mask has in its config which token ends a document for the model.
        self.end = self.tokenizer.eod_id if config.document_end is None else config.document_end
        self._model = model
        self.known = torch.zeros(config.model.vocab_size, dtype=torch.bool)
        self.known[list(self.tokenizer.known_ids())] = True

    def __call__(self, prompt: str, max_new_tokens: int, **sampling: Any) -> tuple[str, list[int]]:
        """Continue ``prompt``.

        Args:
            prompt: text; an empty one starts a new document.
            max_new_tokens: largest number of tokens to generate.
            sampling: keyword arguments of ``generate``: temperature, top_k, top_p and seed.

        Returns:
            The prompt with its continuation, and the new ids.

        Raises:
            UserError: the prompt is empty and nothing names the token that ends a document.
        """
        ids = [int(token) for token in self.tokenizer.encode(prompt)]
        new = list(self.stream(self.start(ids), max_new_tokens, **sampling))
        return self.tokenizer.decode([*ids, *new]), new

    def pieces(self, prompt: str, max_new_tokens: int, **sampling: Any) -> Iterator[str]:
        """Yield ``prompt`` and then its continuation, piece by piece; joined they are the text of ``__call__``.

        Arguments and errors are those of ``__call__``.
        """
        ids = [int(token) for token in self.tokenizer.encode(prompt)]
        start = self.start(ids)
        yield self.tokenizer.decode(ids)
        text = TextStream(self.tokenizer, ids)
        for token in self.stream(start, max_new_tokens, **sampling):
            yield text.read(token)
        yield text.finish()

    def start(self, prompt: Sequence[int]) -> Sequence[int]:
        """Return the ids that the model reads first: those of ``prompt``, or the end of a document before a new one.

        Where the documents of the run's data begin with a token, so does the text.

        Raises:
            UserError: the prompt is empty and nothing names the token that ends a document.
        """
        if self.tokenizer.bos_id is not None:
            return [self.tokenizer.bos_id, *prompt]
        if prompt:
            return prompt
        if self.end is None:
            raise UserError("--prompt", "is empty and the tokenizer has no end-of-document token", "give some text")
        return [self.end]

    def stream(self, start: Sequence[int], max_new_tokens: int, **sampling: Any) -> Iterator[int]:
        """Continue ``start``, at least one id, and yield each new id as soon as it is drawn; see ``generate``."""
        return stream(self._model, start, max_new_tokens, eod_id=self.end, known_ids=self.known, **sampling)


def model_score(model: ChiarFormer, device: torch.device) -> Score:
    """Return a ``Score`` that runs ``model`` on ``device``, without an engine."""

    @torch.inference_mode()
    def score(inputs: np.ndarray, targets: np.ndarray, first_window: int) -> tuple[torch.Tensor, int]:
        numbers = torch.arange(first_window, first_window + len(inputs), device=device)
        output = model(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), numbers)
        return output.token_losses.double().sum(), int((targets != IGNORED_TARGET).sum())

    return score


def model_classify(model: ChiarFormer, device: torch.device, config: RunConfig) -> Classify:
    """Return a ``Classify`` that runs ``model`` on ``device``, without an engine."""

    @torch.inference_mode()
    def classify(samples: np.ndarray, task: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        name, head = config.tasks[task]
        assert head is not None, "the task is a classification"
        tokens = torch.from_numpy(samples).to(device)
        sample_ids = torch.arange(first, first + len(samples), device=device)
        output = model(tokens[:, :-1], tokens[:, -1], sample_ids, head=name)
        confusion = confusion_matrix(tokens[:, -1], output.logits.argmax(-1), head.classes)
        return output.token_losses.double().sum(), confusion

    return classify


Scored = TypeVar("Scored")


def with_progress(
    score: Callable[[np.ndarray, Any, int], Scored], advance: Callable[[int], None]
) -> Callable[[np.ndarray, Any, int], Scored]:
    """Return ``score`` with a call of ``advance`` after it, with the number of windows or examples that it scored."""

    def scored(inputs: np.ndarray, other: Any, first: int) -> Scored:
        result = score(inputs, other, first)
        advance(len(inputs))
        return result

    return scored
