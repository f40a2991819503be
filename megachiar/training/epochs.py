"""``training.epochs`` becomes steps as soon as the datasets can be measured, before anything depends on them."""

from __future__ import annotations

from pathlib import Path

from megachiar.config import RunConfig
from megachiar.config.run_length import steps_of_epochs
from megachiar.data.sampling.dataset import part_of, tokens_read
from megachiar.data.sampling.order import StreamOrder
from megachiar.data.storage.files import bin_path
from megachiar.data.storage.reader import IndexedDataset
from megachiar.errors import UserError
from megachiar.topology import LaunchError


def resolve_epochs(config: RunConfig) -> RunConfig:
    """Return ``config`` with the steps that its epochs make of the training data; as it is where it has no epochs.

    Raises:
        LaunchError: a source is missing or shorter than one sample, or ``training.steps`` says otherwise.
    """
    epochs, steps = config.training.epochs, config.training.steps
    if epochs is None:
        return config
    try:
        length = config.sequence_length
        if config.tasks[0].head is None:
            samples = sum(samples_of_a_pass(source.path, length, source.fraction) for source in config.data.train)
        else:  # a sample is a document
            samples = sum(part_of(IndexedDataset(s.path).documents, s.fraction) for s in config.data.train)
    except UserError as error:  # every rank reads the same files
        raise LaunchError(error.where, error.problem, error.remedy) from error
    made = steps_of_epochs(epochs, samples, config.training.global_batch_size)
    if steps is not None and steps != made:
        raise LaunchError(
            "training.steps",
            f"is {steps:,}, but training.epochs {epochs:g} make {made:,} of {samples:,} samples an epoch",
            "keep one of the two",
        )
    return config.with_steps(made)


def samples_of_a_pass(prefix: Path, sequence_length: int, fraction: float = 1.0) -> int:
    """Return how many samples one pass over a source holds, of which ``fraction`` is read.

    Raises:
        UserError: the source is missing, damaged, or shorter than one sample.
    """
    tokens = tokens_read(prefix, fraction) or IndexedDataset(prefix).tokens.size
    return StreamOrder(tokens, sequence_length, key=(), where=bin_path(prefix)).samples_per_epoch
