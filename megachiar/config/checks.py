"""Checks over several keys and sections, which the type of a single key cannot express.

Each check names the sections that it needs as its arguments, and runs when all of them could be typed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

from megachiar.config.cuda_graphs import why_not_captured
from megachiar.config.errors import Problem
from megachiar.config.evaluation import TASK_PREFIX, EvaluationConfig, evaluation_tasks
from megachiar.config.model import ModelConfig
from megachiar.config.profiling import profiling
from megachiar.config.reliability import ReliabilityConfig
from megachiar.config.router_checks import router
from megachiar.config.run_length import LENGTHS, steps_of_tokens
from megachiar.config.sections import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainingConfig,
    sample_length,
)
from megachiar.config.static_shapes import why_shapes_follow_routes
from megachiar.config.task_checks import auxiliary_tasks, classification
from megachiar.config.tasks import MixedConfig


def run(sections: dict[str, Any]) -> list[Problem]:
    """Run every check whose sections are there and return all problems.

    Args:
        sections: typed sections by name.
    """
    return [
        problem
        for check in CHECKS
        if (needed := list(inspect.signature(check).parameters)) and all(name in sections for name in needed)
        for problem in check(**{name: sections[name] for name in needed})
    ]


def model_shape(model: ModelConfig) -> Iterator[Problem]:
    """Check that heads divide the channels evenly, and that a chiar model has a first and a last layer."""
    d, heads = model.hidden_size, model.num_attention_heads
    if (problem := uneven_heads(d, heads)) is not None:
        other_heads = f", or num_attention_heads to one of {_divisors(d)}" if d % 2 == 0 else ""
        yield Problem(
            "model.num_attention_heads",
            f"{heads} with model.hidden_size {d}: {problem}",
            f"set hidden_size to {nearest_hidden_sizes(d, heads)}{other_heads}",
        )
    if model.kind == "chiar" and model.num_layers < 2:
        yield Problem(
            "model.num_layers",
            f"is {model.num_layers}; a chiar model has a DCT layer first and an attention layer last, so at least 2",
            "use more layers or kind: baseline",
        )


def uneven_heads(hidden_size: int, heads: int) -> str | None:
    """Say why a model of this size cannot have as many heads; None if it can."""
    if hidden_size % heads:
        return f"{heads} does not divide {hidden_size}"
    channels = hidden_size // heads
    return f"a head has {channels} channels, and rotary embedding needs an even number" if channels % 2 else None


def nearest_hidden_sizes(hidden_size: int, heads: int) -> str:
    """Return the nearest sizes below and above that as many heads can share, as text."""
    below = hidden_size // (2 * heads) * 2 * heads
    return f"{below} or {below + 2 * heads}" if below else str(2 * heads)


def sequence_length(model: ModelConfig, data: DataConfig) -> Iterator[Problem]:
    """Check that the model has positions for a whole sequence."""
    if data.sequence_length and data.sequence_length > model.max_sequence_length:
        yield Problem(
            "data.sequence_length",
            f"{data.sequence_length} is above model.max_sequence_length {model.max_sequence_length}",
            "lower it or raise model.max_sequence_length",
        )


def batch(training: TrainingConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Check that micro-batches fill the global batch, on every data-parallel rank alike."""
    unit = training.micro_batch_size * (parallel.data_size or 1)
    if training.global_batch_size % unit:
        ranks = f" * parallel.data_size {parallel.data_size}" if parallel.data_size else ""
        below = training.global_batch_size // unit * unit
        yield Problem(
            "training.global_batch_size",
            f"{training.global_batch_size} is no multiple of micro_batch_size {training.micro_batch_size}{ranks}",
            f"use {f'{below} or ' if below else ''}{below + unit}",
        )


def run_length(model: ModelConfig, data: DataConfig, training: TrainingConfig) -> Iterator[Problem]:
    """Check that the length of the run is given, and only once."""
    steps, tokens = training.steps, training.tokens
    if all(getattr(training, name) is None for name in LENGTHS):
        yield Problem("training", "does not say how long the run is", "set one of steps, tokens and epochs")
    elif tokens is not None and training.epochs is not None:
        yield Problem("training.epochs", f"is {training.epochs:g} beside tokens {tokens:,}", "keep one of the two")
    elif steps is not None and tokens is not None:
        made = steps_of_tokens(tokens, training.global_batch_size, sample_length(model, data))
        if steps != made:
            yield Problem("training.steps", f"is {steps:,}, but tokens {tokens:,} make {made:,}", "keep one of the two")


def layout(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Check that the kinds of parallelism go together and divide the model's sizes."""
    pp, tp = parallel.pipeline_size, parallel.tensor_size
    if pp > 1 and parallel.zero_stage >= 2:
        yield Problem(
            "parallel.zero_stage",
            f"{parallel.zero_stage} with pipeline_size {pp}: pipeline stages keep gradients and parameters whole",
            "use zero_stage 1, or pipeline_size 1",
        )
    if pp * tp > 1 and parallel.zero_stage == 0:
        yield Problem(
            "parallel.zero_stage",
            f"0 with pipeline_size {pp} * tensor_size {tp}",
            "use zero_stage 1 (on one replica it shards nothing)",
        )
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        yield Problem("parallel.offload_optimizer", "is true with zero_stage 0", "use zero_stage 1, 2 or 3")
    sizes = (("num_attention_heads", model.num_attention_heads), ("ffn_hidden_size", model.ffn_size))
    for name, size in (*sizes, ("vocab_size", model.vocab_size)):
        if size % tp:
            yield Problem(
                "parallel.tensor_size",
                f"{tp} does not divide model.{name} {size}",
                f"choose a divisor or pad model.{name} to {-(-size // tp) * tp}",
            )
    if parallel.sequence and tp == 1:
        yield Problem("parallel.sequence", "is true with tensor_size 1", "raise tensor_size or set it to false")


def stages(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> Iterator[Problem]:
    """Check that each pipeline stage gets a layer, or a group of layers that are recomputed together."""
    pp, interval = parallel.pipeline_size, training.activation_checkpoint_interval
    if pp > model.num_layers:
        yield Problem(
            "parallel.pipeline_size",
            f"{pp} stages for {model.num_layers} layers",
            f"use at most {model.num_layers}",
        )
    elif interval and pp > (groups := -(-model.num_layers // interval)):
        yield Problem(
            "training.activation_checkpoint_interval",
            f"{interval} makes {groups} groups of {model.num_layers} layers, fewer than {pp} stages",
            f"use at most {max(i for i in range(1, interval) if -(-model.num_layers // i) >= pp)}",
        )


def sequence_rows(
    model: ModelConfig, data: DataConfig, parallel: ParallelConfig, training: TrainingConfig
) -> Iterator[Problem]:
    """Check that tensor-parallel ranks can share the rows of a micro-batch evenly."""
    length = sample_length(model, data)
    rows, tp = training.micro_batch_size * length, parallel.tensor_size
    if parallel.sequence and rows % tp:
        yield Problem(
            "parallel.sequence",
            f"{tp} ranks cannot share micro_batch_size {training.micro_batch_size} * {length} = {rows} rows evenly",
            f"make training.micro_batch_size a multiple of {tp}, or change data.sequence_length",
        )


def precision(precision: PrecisionConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Check that gradients, master weights and loss scale suit the compute type."""
    compute, accumulation = precision.compute, precision.gradient_accumulation
    if accumulation not in ("fp32", compute):
        yield Problem(
            "precision.gradient_accumulation",
            f"is {accumulation} with compute {compute}",
            f"use fp32{'' if compute == 'fp32' else f' or {compute}'}",
        )
    if compute != "fp32" and parallel.zero_stage == 0:
        yield Problem(
            "parallel.zero_stage",
            f"is 0 with compute {compute}: DeepSpeed keeps no sound fp32 master weights there",
            "use zero_stage 1 (on one rank it shards nothing)",
        )
    if not math.log2(precision.initial_loss_scale).is_integer():
        yield Problem("precision.initial_loss_scale", f"{precision.initial_loss_scale} is no power of two", "use 65536")


def muon(optimizer: OptimizerConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Check that Muon, which needs whole matrices, can have them in this layout."""
    if optimizer.kind != "muon":
        return
    if parallel.zero_stage == 3:
        yield Problem(
            "optimizer.kind",
            "is muon with parallel.zero_stage 3, which cuts every matrix over all replicas: Muon needs whole matrices",
            "use zero_stage 0, 1 or 2, or kind: adamw",
        )
    if parallel.offload_optimizer:
        yield Problem(
            "optimizer.kind",
            "is muon with parallel.offload_optimizer: the host would compute Muon's matrix products",
            "set offload_optimizer to false, or use kind: adamw",
        )


def schedule(schedule: ScheduleConfig, optimizer: OptimizerConfig) -> Iterator[Problem]:
    """Check that warm-up, decay and the lowest learning rate leave room for each other."""
    if schedule.minimum_learning_rate > optimizer.learning_rate:
        yield Problem(
            "schedule.minimum_learning_rate",
            f"{schedule.minimum_learning_rate} is above optimizer.learning_rate {optimizer.learning_rate}",
            "lower it",
        )
    # Nothing is checked against training.steps: a run cut short with --set training.steps=3 just stays in warm-up.
    end = schedule.decay_steps
    if schedule.kind == "constant" or end is None:
        return
    if schedule.warmup_steps >= end:
        yield Problem(
            "schedule.warmup_steps", f"{schedule.warmup_steps} leaves nothing of decay_steps {end}", f"use below {end}"
        )
    elif schedule.kind == "wsd" and schedule.warmup_steps > end * (1 - schedule.wsd_decay_fraction):
        yield Problem(
            "schedule.wsd_decay_fraction",
            f"{schedule.wsd_decay_fraction} of {end} steps begins before warm-up ends at {schedule.warmup_steps}",
            "shorten the decay or the warm-up",
        )


def evaluation(
    data: DataConfig, mixed: MixedConfig, training: TrainingConfig, evaluation: EvaluationConfig
) -> Iterator[Problem]:
    """Check that there is something to evaluate on if evaluation is asked for."""
    is_asked = bool(evaluation.tasks) or evaluation.has_prompts
    if training.evaluate_every and not is_asked and not _validation_sets(data, mixed):
        yield Problem(
            "training.evaluate_every", f"is {training.evaluate_every} with no data.validation", "name a validation set"
        )


def fractions(data: DataConfig) -> Iterator[Problem]:
    """Check that parts of datasets are read in an order that has parts."""
    for number, source in enumerate(data.train):
        if source.fraction < 1 and data.order == "megatron":
            yield Problem(
                f"data.train.{number}.fraction",
                f"is {source.fraction:g}, but data.order is megatron, which orders whole datasets",
                "use data.order: keyed, or 1",
            )


def test_sets(data: DataConfig) -> Iterator[Problem]:
    """Check that no test set is used for anything but the one test at the end."""
    others = {source.path: "data.train" for source in data.train}
    others |= {path: f"data.validation.{name}" for name, path in data.validation.items()}
    for name, path in data.test.items():
        if path in others:
            yield Problem(
                f"data.test.{name}",
                f"is {path}, which is {others[path]} too: a test says nothing of text that the run has seen or was "
                "chosen by",
                "name text that is used for nothing else, or leave the set out",
            )


def _validation_sets(data: DataConfig, mixed: MixedConfig) -> set[str]:
    """Return the names of all sets that a run is evaluated on."""
    return {*data.validation, *(name for name, task in mixed.tasks.items() if task.validation is not None)}


def best_checkpoint(
    checkpoint: CheckpointConfig,
    data: DataConfig,
    mixed: MixedConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
) -> Iterator[Problem]:
    """Check that what tells the best checkpoint is there, and is measured; what a task measures is known at its start.

    ``megachiar.evaluation`` checks the name of the measure once the task is loaded.
    """
    key, sets = "checkpoint.keep_best", _validation_sets(data, mixed)
    for best in checkpoint.best_of:
        if best not in sets and best.startswith(TASK_PREFIX):
            if not evaluation.tasks:
                yield Problem(key, f"is {best} without evaluation.tasks", "name its task there")
            elif evaluation.tasks_every is None and training.evaluate_every is None:
                yield Problem(key, f"is {best} without evaluation.tasks_every", "set evaluation.tasks_every")
        elif best not in sets:
            remedy = "name one of its sets, eval/TASK/METRIC of a task of evaluation.tasks, or null"
            yield Problem(key, f"{best!r} is no set of data.validation", remedy)
        elif training.evaluate_every is None:
            yield Problem(key, f"is {best} without training.evaluate_every", "set training.evaluate_every")


def exporting(checkpoint: CheckpointConfig, model: ModelConfig) -> Iterator[Problem]:
    """Check that there is a best checkpoint to export, and that the exported model can be what this one is."""
    if checkpoint.export_hf == "best" and checkpoint.keep_best is None:
        yield Problem(
            "checkpoint.export_hf",
            "is best without checkpoint.keep_best",
            "name the validation set there, or set it to last",
        )
    if checkpoint.export_hf is not None and model.kind == "chiar" and model.meta_router.pool == "batch":
        yield Problem(
            "checkpoint.export_hf",
            f"is {checkpoint.export_hf}, but model.meta_router.pool is batch: its gate averages over later tokens and "
            "other sequences, so that nothing can be generated token by token",
            "set it to null, or meta_router.pool to causal or none",
        )


def loading(checkpoint: CheckpointConfig) -> Iterator[Problem]:
    """Check that ``checkpoint.load: all`` comes with ``checkpoint.load_from``."""
    if checkpoint.load == "all" and checkpoint.load_from is None:
        yield Problem(
            "checkpoint.load",
            "is all without checkpoint.load_from",
            "name a checkpoint or run folder there",
        )


def rollback(data: DataConfig, checkpoint: CheckpointConfig, reliability: ReliabilityConfig) -> Iterator[Problem]:
    if reliability.on_spike != "rollback":
        return
    if checkpoint.every is None:
        yield Problem(
            "reliability.on_spike",
            "is rollback, but checkpoint.every is null: there would be nothing to go back to",
            "set checkpoint.every",
        )
    if data.order == "megatron":
        yield Problem(
            "reliability.on_spike",
            "is rollback, but data.order is megatron, in which no sample can be left out",
            "use data.order: keyed, or on_spike: skip",
        )


def documents(model: ModelConfig, data: DataConfig) -> Iterator[Problem]:
    """Check that the id that ends a document is used, and is in the vocabulary."""
    end = data.document_end
    if end is None:
        return
    if not data.document_mask:
        yield Problem("data.document_end", f"is {end} without data.document_mask", "remove it or set the mask to true")
    elif end >= model.vocab_size:
        yield Problem(
            "data.document_end", f"{end} is outside model.vocab_size {model.vocab_size}", "name an id below it"
        )


def compilation(parallel: ParallelConfig, training: TrainingConfig) -> Iterator[Problem]:
    """Check that no communication happens within the layers that are to be compiled."""
    if training.compile is None:
        return
    for key, wrong in (("tensor_size", parallel.tensor_size > 1), ("zero_stage", parallel.zero_stage == 3)):
        if wrong:
            yield Problem(
                "training.compile",
                f"is {training.compile} with parallel.{key} {getattr(parallel, key)}: its communication cannot be "
                "compiled with the layers",
                "set training.compile to null, or use tensor_size 1 and zero_stage 0 to 2",
            )


def static_shapes(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> Iterator[Problem]:
    """Check that static shapes are possible where they are demanded."""
    reason = why_shapes_follow_routes(model, parallel)
    if training.static_shapes is True and reason is not None:
        yield Problem("training.static_shapes", f"is true, but {reason}", "set it to auto or false")


def cuda_graphs(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> Iterator[Problem]:
    """Check that layers can be captured where it is demanded."""
    if training.cuda_graphs is None:
        return
    reason = why_not_captured(model, parallel, training)
    if reason is not None:
        yield Problem("training.cuda_graphs", f"is {training.cuda_graphs}, but {reason}", "set it to null")


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0 and n // i % 2 == 0)


CHECKS: tuple[Callable[..., Iterator[Problem]], ...] = (
    model_shape,
    router,
    sequence_length,
    batch,
    run_length,
    layout,
    stages,
    sequence_rows,
    precision,
    muon,
    schedule,
    evaluation,
    evaluation_tasks,
    fractions,
    test_sets,
    best_checkpoint,
    exporting,
    loading,
    rollback,
    documents,
    compilation,
    static_shapes,
    cuda_graphs,
    classification,
    auxiliary_tasks,
    profiling,
)
