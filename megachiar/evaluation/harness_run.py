"""Let lm-evaluation-harness ask tasks of a model. This module imports the harness: look for it first.

A task is YAML, data and code of others. What fails in it becomes one message; an error of the model stays what it is.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import get_sample_size

from megachiar.errors import UserError
from megachiar.evaluation import harness_model
from megachiar.evaluation.harness_model import HarnessModel, Rehearsal
from megachiar.evaluation.harness_tasks import LoadedTasks, TaskSettings, harness_seeds, prepare, reason_of
from megachiar.evaluation.quiet_bars import without_bars


def ask_tasks(
    model: HarnessModel,
    loaded: LoadedTasks,
    settings: TaskSettings,
    *,
    bootstrap: int = 0,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Return the harness's results.

    Args:
        model: that is asked.
        loaded: the tasks.
        settings: of the tasks.
        bootstrap: draws of the standard errors; 0 for no standard errors.
        log_samples: whether the results hold each document with what the model said of it.

    Raises:
        UserError: the requests, the filters or the measures of a task cannot be computed.
    """
    where = f"{settings.asked_by} {','.join(loaded.tasks)}"
    with harness_seeds(), without_bars(), _one_message(where):
        results: dict[str, Any] = evaluate(
            lm=model,
            task_dict=prepare(loaded, settings),
            limit=settings.limit,
            bootstrap_iters=bootstrap,
            log_samples=log_samples,
        )
    return results


def rehearse(model: Rehearsal, loaded: LoadedTasks, settings: TaskSettings) -> None:
    """Check that the requests of tasks can be made and read, in a fraction of the time that an evaluation takes.

    Raises:
        UserError: those of a task cannot.
    """
    model.check(loaded.tasks)
    prepare(loaded, settings)
    for name, task in loaded.tasks.items():
        with harness_seeds(), without_bars(), _one_message(f"{settings.asked_by} {name}"):
            task.build_all_requests(limit=get_sample_size(task, settings.limit), rank=0, world_size=1)
            by_kind = defaultdict(list)
            for request in task.instances:
                by_kind[request.request_type].append(request)
            for kind, requests in by_kind.items():
                getattr(model, kind)(requests)


@contextlib.contextmanager
def _one_message(where: str) -> Iterator[None]:
    """Turn an error of the harness, or of the code of a task, into one message."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or _comes_from_model(error):
            raise
        remedy = "mend its YAML file and data, or leave it out"
        raise UserError(where, f"cannot be measured: {reason_of(error)}", remedy) from None


def _comes_from_model(error: Exception) -> bool:
    """Return whether an error was raised while the model was asked, and not by the harness around it."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == harness_model.__name__ for frame in frames)
