"""The keys of ``evaluation:``, what a run is asked beside its validation sets, and the checks over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from megachiar.config.errors import Problem
from megachiar.config.model import ModelConfig
from megachiar.config.paths import ConfigPath
from megachiar.config.section import Section
from megachiar.config.sections import ParallelConfig, TrainingConfig
from megachiar.config.tasks import TaskConfig

TASK_PREFIX = "eval/"
"""The beginning of the names of what tasks measure: eval/TASK/METRIC in metrics, charts and checkpoint.keep_best."""


class EvaluationConfig(Section):
    """What a run is asked now and then beside its validation sets: tasks, and texts that it continues."""

    tasks: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tasks of lm-evaluation-harness by name, or YAML files of them. Measures are called eval/TASK/METRIC. It needs the
    package lm-eval."""
    include_path: ConfigPath | None = None
    """Folder with YAML files of more tasks."""
    num_fewshot: NonNegativeInt | None = None
    """Examples before each question; when not given, what each task says."""
    limit: PositiveInt | Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Documents of each task, from the first on, or a share of them below 1; null: all."""
    batch_size: PositiveInt | None = None
    """Texts that a rank reads at once; training.micro_batch_size when not given."""
    tasks_every: PositiveInt | None = None
    """Steps between evaluations on tasks, and between samples; training.evaluate_every when not given. Both come after
    the last step too."""
    at_start: bool = False
    """Whether a new run is evaluated before its first step, as step 0: on validation sets, tasks and prompts."""
    prompts: Annotated[tuple[str, ...], Field(strict=False)] | ConfigPath = ()
    """Texts that the run continues, for the log, the charts and samples.jsonl: a list, or a file with one text a
    line."""
    new_tokens: PositiveInt = 64
    """Tokens of a continuation at most."""
    temperature: NonNegativeFloat = 0.0
    """Divides the logits of a continuation; 0 takes the likeliest token. Draws depend on training.seed and the step."""

    @property
    def has_prompts(self) -> bool:
        """Whether the run continues texts."""
        return self.prompts != ()


def evaluation_tasks(
    evaluation: EvaluationConfig,
    task: TaskConfig,
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
) -> Iterator[Problem]:
    """Check that the model can be asked, in the layout of the run, and that the keys go together."""
    key = "evaluation.tasks" if evaluation.tasks else "evaluation.prompts"
    if evaluation.tasks_every is not None and not evaluation.tasks and not evaluation.has_prompts:
        problem = f"is {evaluation.tasks_every} without evaluation.tasks and evaluation.prompts"
        yield Problem("evaluation.tasks_every", problem, "name some, or remove it")
    if evaluation.include_path is not None and not evaluation.tasks:
        yield Problem("evaluation.include_path", "is given without evaluation.tasks", "name tasks of it, or remove it")
    if not evaluation.tasks and not evaluation.has_prompts:
        return
    if task.kind == "classification":
        yield Problem(key, "is given, but task.kind is classification", "remove it: the model continues no text")
    if evaluation.tasks and model.kind == "chiar" and model.meta_router.pool == "batch":
        problem = (
            "is given, but model.meta_router.pool is batch: its gate averages over later tokens and other texts, so "
            "that the probability of a text depends on what it is asked with"
        )
        yield Problem(key, problem, "remove it, or set meta_router.pool to causal or none")
    splits = {
        "parallel.tensor_size": parallel.tensor_size > 1,
        "parallel.pipeline_size": parallel.pipeline_size > 1,
        "parallel.zero_stage": parallel.zero_stage == 3,
    }
    for name in (name for name, is_split in splits.items() if is_split):
        value = getattr(parallel, name.rpartition(".")[2])
        problem = f"is given, but {name} is {value}: no rank has the whole model, which texts of any length are read by"
        yield Problem(key, problem, "remove it, and measure the run's checkpoints by `megachiar evaluate RUN --tasks`")
