"""Find and load tasks of lm-evaluation-harness by name: its own, and those of a folder of YAML files.

The harness is imported where it is needed: look for it first (``check_library``).
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megachiar.console import silence
from megachiar.errors import UserError
from megachiar.evaluation.harness_library import check_library

SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}
"""Seeds of the harness's global random numbers and of its examples in prompts, by its names; its own defaults."""
_NEAR = 5
"""Names that an error proposes."""
_MEANS_NO_DATA = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "DatasetNotFoundError")
"""Names of exceptions by which the libraries of Hugging Face say that data is neither here nor to be had."""


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks are asked, and how.

    Attributes:
        names: of tasks, groups or tags, or paths of YAML files.
        include_path: folder of YAML files of tasks beside the harness's own, which win; None for none.
        num_fewshot: examples before each question; None leaves it to the task.
        limit: documents of each task, from the first on, or a share of them below 1; None for all.
        asked_by: the option or key that names the tasks, for errors.
    """

    names: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    asked_by: str = "--tasks"


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        manager: of the harness, which knows all names.
        top: tasks and groups as they were named.
        tasks: each single task by name.
        groups: each group by name.
    """

    manager: Any
    top: list[Any] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)


def load_tasks(settings: TaskSettings) -> LoadedTasks:
    """Load tasks and their data.

    Raises:
        UserError: the harness is missing, a task is unknown or cannot be loaded, or its data is not to be had.
    """
    check_library(settings.asked_by)
    quiet_logs()
    folder = settings.include_path
    if folder is not None and not folder.is_dir():
        raise UserError(folder, "is no folder of tasks", "name a folder that holds YAML files of lm-evaluation-harness")
    loaded = LoadedTasks(_manager(settings))
    for name in settings.names:
        found = _load(loaded.manager, name, settings)
        loaded.top.extend([found["groups"][name]] if name in found["groups"] else found["tasks"].values())
        loaded.tasks.update(found["tasks"])
        loaded.groups.update(found["groups"])
    return loaded


def prepare(loaded: LoadedTasks, settings: TaskSettings) -> dict[str, Any]:
    """Return loaded tasks as the harness's ``evaluate`` takes them, with the defaults of its ``simple_evaluate``."""
    for task in loaded.tasks.values():
        given = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and given != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif given is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot_seed"])
    children = {name: group.child_names for name, group in loaded.groups.items()}
    return {"tasks": loaded.tasks, "groups": loaded.groups, "group_map": children}


@contextlib.contextmanager
def harness_seeds() -> Iterator[None]:
    """Seed the global random numbers for this block as the harness does, and leave them behind it as they were."""
    python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            random.seed(SEEDS["random_seed"])
            np.random.seed(SEEDS["numpy_seed"])
            torch.manual_seed(SEEDS["torch_seed"])
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)


def quiet_logs() -> None:
    """Let the harness and the library of its data say no more than warnings that a user can act on."""
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _manager(settings: TaskSettings) -> Any:
    """Return the harness's index of tasks: that of the folder alone, which takes no time, if it has all names."""
    from lm_eval.tasks import TaskManager

    folder = str(settings.include_path) if settings.include_path is not None else None
    everything: Callable[[], Any] = lambda: TaskManager(include_path=folder)  # noqa: E731
    manager = TaskManager(include_path=folder, include_defaults=False) if folder is not None else everything()
    if folder is not None and not all(
        _is_known(manager, name) and _is_single(manager, name) for name in settings.names
    ):
        manager = everything()
    for name in settings.names:
        if not _is_known(manager, name):
            near = difflib.get_close_matches(name, manager.all_tasks, n=_NEAR, cutoff=0.5)
            question = f"near names are {', '.join(near)}" if near else "`lm_eval ls tasks` lists the harness's own"
            where = f" and {settings.include_path}" if folder is not None else ""
            problem = f"lm-evaluation-harness{where} has no such task"
            raise UserError(
                f"{settings.asked_by} {name}", problem, f"{question}; --include-path adds a folder of tasks"
            )
    return manager


def _is_known(manager: Any, name: str) -> bool:
    return name in manager.task_index or (Path(name).suffix in (".yaml", ".yml") and Path(name).is_file())


def _is_single(manager: Any, name: str) -> bool:
    """Return whether a name is that of a task; groups may name tasks that are not in their folder."""
    return name in manager.all_subtasks


def _load(manager: Any, name: str, settings: TaskSettings) -> Any:
    where = f"{settings.asked_by} {name}"
    try:
        with silence():
            return manager.load([name])
    except UserError:
        raise
    except Exception as error:  # a task is YAML, code and data of others: anything may be wrong with it
        reason = reason_of(error)
        if _needs_network(error):
            problem = f"its data is not on this machine, and cannot be fetched: {reason}"
            remedy = "connect the machine, or use tasks of a folder with `dataset_path: json` and local data_files"
            raise UserError(where, problem, remedy) from None
        remedy = "mend its YAML file and data; paths in data_files count from the folder that the command is started in"
        raise UserError(where, f"cannot be loaded: {reason}", remedy) from None


def reason_of(error: Exception) -> str:
    """Return kind and first line of an error of the harness, or of the code of a task."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _needs_network(error: BaseException | None) -> bool:
    """Return whether an error, or what it was raised from, says that data is missing and cannot be fetched."""
    while error is not None:
        if any(base.__name__ in _MEANS_NO_DATA for base in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False
