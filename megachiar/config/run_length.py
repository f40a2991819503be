"""How long a run is: its steps, or the tokens or epochs that make its steps.

    training.steps      as it is given
    training.tokens     ceil(tokens / (global_batch_size * sequence_length)), resolved when the config is read
    training.epochs     ceil(epochs * samples / global_batch_size), resolved when the data is there to be measured

``samples`` is the number of samples in one pass over every source of ``data.train``, all sources together. Steps are
rounded up. The resolved config keeps the given length beside its steps.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from megachiar.config.sections import TrainingConfig

LENGTHS = ("epochs", "tokens", "steps")
"""The keys of ``training`` that give the length of a run. A config has one of them; those that become steps come
first."""


def steps_of_tokens(tokens: int, global_batch_size: int, sequence_length: int) -> int:
    """Return the steps that read ``tokens`` tokens, the last one whole."""
    return -(-tokens // (global_batch_size * sequence_length))


def samples_of_epochs(epochs: float, samples_per_epoch: int) -> int:
    """Return the number of samples of ``epochs`` passes over all data; ``epochs`` counts as its decimal notation."""
    return math.ceil(Fraction(repr(epochs)) * samples_per_epoch)


def steps_of_epochs(epochs: float, samples_per_epoch: int, global_batch_size: int) -> int:
    """Return the steps that read the samples of ``epochs``, the last one whole."""
    return -(-samples_of_epochs(epochs, samples_per_epoch) // global_batch_size)


def asked_length(training: TrainingConfig) -> tuple[str, float]:
    """Return the key that says how long the run is, without its section, and the value."""
    return next((name, value) for name in LENGTHS if (value := getattr(training, name)) is not None)


def drop_other_lengths(training: Any, over: dict[str, Any]) -> None:
    """Remove from the mapping ``training`` each length of the run that ``over`` replaces by another one."""
    given = [name for name in LENGTHS if over.get(name) is not None]
    if given and isinstance(training, dict):
        for name in LENGTHS:
            if name not in given:
                training.pop(name, None)
