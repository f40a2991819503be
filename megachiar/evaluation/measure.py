"""Ask tasks of a checkpoint, as ``lm_eval run`` does of a model of transformers, and write what came out.

The results have the form of the harness's own file: ``results`` by task and ``metric,filter``, ``configs``,
``versions``, ``n-shot``, ``higher_is_better``, ``n-samples`` and ``config``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megachiar.checkpoint.reading import locate_checkpoint
from megachiar.data.storage.files import write_atomically
from megachiar.evaluation.harness_tasks import SEEDS, TaskSettings, harness_seeds, load_tasks
from megachiar.evaluation.text_model import TextModel, check_evaluable
from megachiar.inference.loaded_run import default_device
from megachiar.inference.loading import load_model
from megachiar.model.dtypes import DTYPES
from megachiar.training.run_tokenizer import run_tokenizer

BOOTSTRAP = 100_000
"""Draws of the harness's standard errors; its own default."""


@dataclass(frozen=True)
class MeasureOptions:
    """How a run is measured.

    Attributes:
        batch_size: texts of one forward pass.
        dtype: name of the weights' type; None for that of the run.
        log_samples: whether the results hold each document with what the model said of it.
    """

    batch_size: int = 8
    dtype: str | None = None
    log_samples: bool = False


def measure_tasks(
    run: Path,
    settings: TaskSettings,
    options: MeasureOptions,
    log: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Measure a checkpoint, or the newest whole one of a run folder, on tasks.

    Args:
        run: its path.
        settings: of the tasks.
        options: of the model.
        log: is told of a damaged checkpoint that was passed over.
        progress: is called with what is done, how much of it, and of how much.

    Returns:
        The harness's results.

    Raises:
        UserError: there is no whole checkpoint or no tokenizer, the model cannot be asked, a task cannot be loaded, or
            it asks for what the model does not serve.
    """
    with harness_seeds():
        loaded = load_tasks(settings)
    checkpoint = locate_checkpoint(run, log=log)
    config, model, state = load_model(
        checkpoint, default_device(), DTYPES.get(options.dtype) if options.dtype else None
    )
    check_evaluable(checkpoint, config)
    text_model = TextModel(checkpoint, config, model, run_tokenizer(checkpoint, config))

    from lm_eval import __version__

    from megachiar.evaluation.harness_model import HarnessModel
    from megachiar.evaluation.harness_run import ask_tasks

    asked = HarnessModel(text_model, options.batch_size, progress=progress)
    asked.check(loaded.tasks)
    results = ask_tasks(asked, loaded, settings, bootstrap=BOOTSTRAP, log_samples=options.log_samples)
    parameter = next(model.parameters())
    return results | {
        "config": {
            "model": "megachiar",
            "model_args": {"checkpoint": str(checkpoint)},
            "step": state.step,
            "model_num_parameters": model.parameter_count(),
            "model_dtype": str(parameter.dtype),
            "batch_size": options.batch_size,
            "device": str(parameter.device),
            "limit": settings.limit,
            "bootstrap_iters": BOOTSTRAP,
            "gen_kwargs": None,
            **SEEDS,
        },
        "date": time.time(),
        "lm_eval_version": __version__,
        "eot_token_id": text_model.end,
        "max_length": text_model.longest,
        "model_source": "megachiar",
        "model_name": str(run),
    }


def results_table(results: dict[str, Any]) -> str:
    """Return the harness's table of results, and that of groups if there are any."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def results_json(results: dict[str, Any]) -> str:
    """Return results as JSON, without the samples."""
    from lm_eval.utils import handle_non_serializable

    kept = {name: value for name, value in results.items() if name != "samples"}
    return json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False)


def write_results(results: dict[str, Any], path: Path) -> list[Path]:
    """Write results to ``path``, and the samples of each task, if there are any, beside it; return what was written.

    Raises:
        UserError: the disk refuses a file.
    """
    from lm_eval.utils import handle_non_serializable

    written = [path]
    write_atomically(path, results_json(results).encode() + b"\n")
    for task, samples in (results.get("samples") or {}).items():
        lines = [json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) for sample in samples]
        written.append(samples_path(path, task))
        write_atomically(written[-1], "".join(f"{line}\n" for line in lines).encode())
    return written


def samples_path(path: Path, task: str) -> Path:
    """Return the file beside the results at ``path`` that has the samples of a task."""
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in task)
    return path.with_name(f"{path.stem}_samples_{safe}.jsonl")
