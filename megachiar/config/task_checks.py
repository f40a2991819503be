"""Checks of the sections ``task:`` and ``mixed:``, among the checks over several keys."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megachiar.config.errors import Problem
from megachiar.config.sections import DataConfig, ParallelConfig, TrainingConfig
from megachiar.config.tasks import MAIN_TASK, AuxiliaryTaskConfig, MixedConfig, TaskConfig

_TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")


def classification(task: TaskConfig, data: DataConfig) -> Iterator[Problem]:
    """Check that a classification run has classes, that no other run has, and that its data can be labelled."""
    if task.kind == "language_model":
        for name in ("classes", "head", "padding"):
            if getattr(task, name) != TaskConfig.model_fields[name].default:
                yield Problem(f"task.{name}", "has no effect: task.kind is language_model", "remove it")
        return
    if task.classes is None:
        yield Problem("task.classes", "is missing: task.kind classification needs it", "set the number of classes")
    if data.order != "keyed":
        yield Problem("data.order", f"is {data.order}, which orders the tokens of a language model", "use keyed")
    if data.document_mask:
        yield Problem(
            "data.document_mask", "is true, but a sample of a classification run is one document", "set it to false"
        )


def auxiliary_tasks(
    task: TaskConfig, mixed: MixedConfig, data: DataConfig, training: TrainingConfig, parallel: ParallelConfig
) -> Iterator[Problem]:
    """Check the tasks of a mixed run: their names, their batches, and that there is a main language model."""
    if not mixed.tasks:
        for name in ("probability", "group_size", "seed"):
            if getattr(mixed, name) != MixedConfig.model_fields[name].default:
                yield Problem(f"mixed.{name}", "has no effect: mixed.tasks names no task", "name tasks, or remove it")
        return
    if task.kind != "language_model":
        yield Problem("mixed.tasks", f"join a language model, but task.kind is {task.kind}", "leave the tasks out")
    whole, group = training.global_batch_size, mixed.group_size
    if group is None:
        remedy = "set a divisor of training.global_batch_size; the published training draws for 8 sequences"
        yield Problem("mixed.group_size", "is missing: mixed.tasks need it", remedy)
    elif whole % group:
        yield Problem(
            "mixed.group_size", f"{group} does not divide training.global_batch_size {whole}", "use a divisor"
        )
    for name, auxiliary in mixed.tasks.items():
        yield from _auxiliary_task(name, auxiliary, data)
        yield from _auxiliary_batch(name, auxiliary, training.micro_batch_size * (parallel.data_size or 1))


def _auxiliary_task(name: str, task: AuxiliaryTaskConfig, data: DataConfig) -> Iterator[Problem]:
    key = f"mixed.tasks.{name}"
    if not _TASK_NAME.fullmatch(name) or name == MAIN_TASK:
        taken = " (main is the task of data.train)" if name == MAIN_TASK else ""
        yield Problem(key, f"cannot be the name of a task{taken}", "use letters, digits, - and _")
    for kind, sets, of_task in (("validation", data.validation, task.validation), ("test", data.test, task.test)):
        if name in sets and of_task is not None:
            yield Problem(f"{key}.{kind}", f"data.{kind} has a set named {name} as well", "rename one of the two")
    if task.kind == "classification":
        if task.classes is None:
            yield Problem(f"{key}.classes", "is missing: a classification task needs it", "set the number of classes")
        return
    for field in ("classes", "head", "padding"):
        if getattr(task, field) != AuxiliaryTaskConfig.model_fields[field].default:
            yield Problem(f"{key}.{field}", "has no effect: the task is a language_model", "remove it")


def _auxiliary_batch(name: str, task: AuxiliaryTaskConfig, unit: int) -> Iterator[Problem]:
    if task.global_batch_size % unit:
        yield Problem(
            f"mixed.tasks.{name}.global_batch_size",
            f"{task.global_batch_size} is no multiple of micro_batch_size * data-parallel ranks, {unit}",
            f"use a multiple of {unit}",
        )
