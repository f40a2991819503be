"""The tokens of a step by what is computed for them, and the FLOPs of all, from the config alone."""

from __future__ import annotations

from typing import NamedTuple

from megachiar.config import RunConfig
from megachiar.config.model import ModelConfig
from megachiar.planning.flops import training_flops_per_token


class StepTokens(NamedTuple):
    """The tokens of a step over all replicas, padding included.

    Attributes:
        predicting: tokens of language models, which the model's own head reads.
        classifying: tokens of classifications, whose heads take nothing beside the layers.
    """

    predicting: float
    classifying: float

    @property
    def total(self) -> float:
        """Return the tokens that the layers compute."""
        return self.predicting + self.classifying


def step_tokens(config: RunConfig) -> StepTokens:
    """Return the tokens of a step; of a mixed run their expected numbers, since batches of other tasks are drawn."""
    classifying = config.training.global_batch_size if config.tasks[0].head is not None else 0.0
    predicting = config.training.global_batch_size - classifying
    mixed = config.mixed
    if mixed.tasks:
        draws = config.training.global_batch_size / (mixed.group_size or config.training.global_batch_size)
        weights = sum(task.weight for task in mixed.tasks.values())
        for task in mixed.tasks.values():
            samples = draws * mixed.probability * task.weight / weights * task.global_batch_size
            if task.kind == "classification":
                classifying += samples
            else:
                predicting += samples
    return StepTokens(predicting * config.sequence_length, classifying * config.sequence_length)


def micro_batches_of_replica(config: RunConfig, data_size: int) -> float:
    """Return the number of micro-batches that each of ``data_size`` replicas computes in a step."""
    at_once = config.training.micro_batch_size * data_size * config.sequence_length
    return step_tokens(config).total / at_once


def step_flops(config: RunConfig, model: ModelConfig) -> float:
    """Return the FLOPs of a step of ``model`` over all ranks, all tasks of the run included: the numerator of MFU."""
    tokens, share = step_tokens(config), _attention_share_of_layers(model)
    return sum(
        count * training_flops_per_token(model, config.sequence_length, share, predicts_tokens=predicts)
        for count, predicts in ((tokens.predicting, True), (tokens.classifying, False))
        if count
    )


def _attention_share_of_layers(model: ModelConfig) -> float:
    """Return the expected share of all layers' tokens that take attention."""
    if model.kind == "baseline":
        return 1.0
    return (len(model.routed_layers) * model.expected_attention_share + 1) / model.num_layers
