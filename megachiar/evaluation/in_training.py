"""Ask tasks and prompts of a run while it trains. Nothing of it changes the run: not its state, not its random numbers.

    all data-parallel ranks    the same tasks, documents and batches; each rank reads its share of the batches
    rank 0                     continues the prompts

The ranks share the batches and exchange scores, so that measures are those of a single process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megachiar.config import RunConfig
from megachiar.config.evaluation import TASK_PREFIX
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.engine.engine import Engine
from megachiar.errors import UserError, disk_errors
from megachiar.evaluation.completions import Completion, complete
from megachiar.evaluation.continuations import Ranks
from megachiar.evaluation.harness_library import check_library
from megachiar.evaluation.harness_tasks import LoadedTasks, TaskSettings, harness_seeds, load_tasks
from megachiar.evaluation.text_model import TextModel
from megachiar.inference.sampling import Sampling
from megachiar.topology import raise_together
from megachiar.training.asked import SAMPLES, Asked, NothingAsked
from megachiar.training.run_tokenizer import run_tokenizer
from megachiar.training.samples_file import Sample

KEY = "evaluation.tasks"
LARGE_PRIME = 1_000_003
HIGHEST_SEED = 2**31
"""Seeds of draws are below this number."""


def check_asked(config: RunConfig) -> None:
    """Check before a run starts that the harness is there if tasks are asked.

    Raises:
        UserError: it is missing or too old.
    """
    if config.evaluation.tasks:
        check_library(KEY)


def make_asked(config: RunConfig, engine: Engine, tokenizer: Tokenizer | None) -> Asked:
    """Load the tasks and prompts of a run; every rank calls this function.

    Args:
        config: of the run.
        engine: that holds the model.
        tokenizer: of the run's data; None for the one that the run folder keeps.

    Raises:
        LaunchError: a task or the file of prompts cannot be loaded, the run has no tokenizer, or
            ``checkpoint.keep_best`` names what no task measures. Every rank raises it.
    """
    if not config.evaluation.tasks and not config.evaluation.has_prompts:
        return NothingAsked()
    found, problem = None, None
    # Rank 0 first: it prepares the data of tasks once, and the others find it in the cache.
    for is_turn in (engine.topology.is_main, not engine.topology.is_main):
        try:
            if is_turn:
                found = _load(config, engine, tokenizer)
        except UserError as error:
            problem = error
        raise_together(problem)
    assert found is not None, "one of the turns is this rank's"
    return found


def _load(config: RunConfig, engine: Engine, tokenizer: Tokenizer | None) -> AskedOfRun:
    keys = config.evaluation
    settings = TaskSettings(keys.tasks, keys.include_path, keys.num_fewshot, keys.limit, asked_by=KEY)
    with harness_seeds():
        loaded = load_tasks(settings) if keys.tasks else None
    if tokenizer is None:
        tokenizer = run_tokenizer(config.checkpoint_folder / "none", config)
    asked = AskedOfRun(config, engine, tokenizer, settings, loaded, read_prompts(keys.prompts))
    for name in config.checkpoint.best_of:
        if not name.startswith(TASK_PREFIX) or name in config.data.validation:
            continue
        if name not in asked.metrics:
            known = ", ".join(sorted(asked.metrics))
            raise UserError(f"checkpoint.keep_best {name}", "is measured by no task of the run", f"name one of {known}")
        if name not in asked.maximised and name not in asked.minimised:
            problem = "has no best: its task does not say whether the highest or the lowest is"
            raise UserError(
                f"checkpoint.keep_best {name}", problem, "give the metric higher_is_better in the YAML file of its task"
            )
    return asked


def read_prompts(prompts: tuple[str, ...] | Path) -> tuple[str, ...]:
    """Return prompts as they are, or the lines of a file that are not empty.

    Raises:
        UserError: the file cannot be read, is no UTF-8, or has no prompt.
    """
    if isinstance(prompts, tuple):
        return prompts
    with disk_errors(prompts, "read"):
        content = prompts.read_bytes()
    try:
        lines = tuple(line for line in content.decode().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"evaluation.prompts {prompts}", f"is no UTF-8: {error}", "write it as UTF-8") from None
    if not lines:
        raise UserError(f"evaluation.prompts {prompts}", "has no prompt", "write one text a line")
    return lines


class AskedOfRun:
    """The tasks and prompts of a run, see ``megachiar.training.asked.Asked``.

    Attributes:
        names: as there.
        maximised: as there.
        minimised: as there.
        metrics: the names ``eval/TASK/METRIC`` of all measures.

    Args:
        config: of the run.
        engine: that holds the model.
        tokenizer: of the run.
        settings: of the tasks.
        loaded: the tasks; None for none.
        prompts: texts to continue.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        tokenizer: Tokenizer,
        settings: TaskSettings,
        loaded: LoadedTasks | None,
        prompts: Sequence[str],
    ):
        self._config, self._engine, self._settings, self._prompts = config, engine, settings, prompts
        self._loaded = loaded
        tasks = loaded.tasks if loaded is not None else {}
        self.names: Sequence[str] = [*(TASK_PREFIX + name for name in tasks), *([SAMPLES] if prompts else [])]
        directions = {
            f"{TASK_PREFIX}{name}/{metric}{of_filter}": is_higher
            for name, task in tasks.items()
            for metric, is_higher in task.higher_is_better().items()
            for of_filter in _filters(task)
        }
        self.metrics: Collection[str] = frozenset(directions)
        # The harness has None where neither the task nor the metric says what is better.
        self.maximised: Collection[str] = frozenset(name for name, is_higher in directions.items() if is_higher)
        self.minimised: Collection[str] = frozenset(
            name for name, is_higher in directions.items() if is_higher is not None and not is_higher
        )
        self._text_model = TextModel(config.logging.folder, config, engine.whole_model(), tokenizer)
        self._batch_size = config.evaluation.batch_size or config.training.micro_batch_size
        self._most_new = min(config.evaluation.new_tokens, max(1, self._text_model.longest - 1))
        room = self._text_model.longest - self._most_new
        model = self._text_model
        self._prompt_ids = [model.encode(prompt)[-room:] or [model.prefix] for prompt in prompts]
        if tasks:
            from megachiar.evaluation.harness_model import Rehearsal
            from megachiar.evaluation.harness_run import rehearse

            assert loaded is not None, "there are tasks"
            rehearse(Rehearsal(self._text_model, self._batch_size), loaded, settings)

    def measure(self, name: str, before_batch: Callable[[int], None]) -> Mapping[str, float]:
        """Return what a task measures, by metric; one that has several filters has ``METRIC/FILTER`` for each."""
        from megachiar.evaluation.harness_model import HarnessModel
        from megachiar.evaluation.harness_run import ask_tasks

        assert self._loaded is not None, "there are tasks"
        task = name.removeprefix(TASK_PREFIX)
        self._engine.whole_model()
        asked = HarnessModel(
            self._text_model,
            self._batch_size,
            Ranks(self._engine.topology.data_rank, self._engine.topology.data_size, self._gather),
            seed=self._config.training.seed,
            together=before_batch,
        )
        only = LoadedTasks(self._loaded.manager, tasks={task: self._loaded.tasks[task]})
        return measures_of(ask_tasks(asked, only, self._settings)["results"][task])

    def continue_prompts(self, step: int) -> list[Sample]:
        """Return the continuations, on rank 0 alone; draws depend on the run's seed, the step and the prompt."""
        if not self._engine.topology.is_main:
            return []
        self._engine.whole_model()
        keys, wanted = self._config.evaluation, []
        for number, ids in enumerate(self._prompt_ids):
            sampling = Sampling(keys.temperature, seed=seed_of(self._config.training.seed, step, number))
            wanted.append(Completion(ids, self._most_new, (), sampling))
        texts = complete(self._text_model, wanted, self._batch_size)
        return [Sample(prompt, text) for prompt, text in zip(self._prompts, texts, strict=True)]

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self._engine.topology.data_size
        dist.all_gather_object(found, value, group=self._engine.control)
        return found


def seed_of(run: int, step: int, prompt: int) -> int:
    """Return the seed of the draws of a prompt, counted from 0, after a step of a run with this seed."""
    return ((run * LARGE_PRIME + step) * LARGE_PRIME + prompt) % HIGHEST_SEED


def _filters(task: Any) -> list[str]:
    """Return what stands behind the metrics of a task for each of its filters, as ``measures_of`` writes it."""
    names = [each["name"] for each in task.get_config("filter_list") or ()]
    return [f"/{name}" for name in names] if len(names) > 1 else [""]


def measures_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a task's results, of which the harness calls each ``METRIC,FILTER``.

    The filter is left out where a metric has but one, whose value may be infinite at times.
    """
    found: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        metric, comma, of_filter = key.partition(",")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if comma and is_number and not metric.endswith("_stderr"):
            found.setdefault(metric, {})[of_filter] = float(value)
    return {
        metric if len(by_filter) == 1 else f"{metric}/{of_filter}": value
        for metric, by_filter in found.items()
        for of_filter, value in by_filter.items()
        if math.isfinite(value)
    }
