"""Read all that a report shows of a run, finished or not: config, result, history; or a collected result alone.

What is missing or damaged is noted and does not stop the report. A folder that is no run does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState, complete_checkpoints, read_state
from megachiar.checkpoint.reading import is_checkpoint
from megachiar.config import RunConfig, load_config
from megachiar.errors import UserError, disk_errors
from megachiar.model import build_model
from megachiar.reporting.history import Record, read_history
from megachiar.reporting.notes import Notes
from megachiar.reporting.run_names import RunName
from megachiar.training.run_result import Measures, RunResult, read_result, read_result_file

_SIGNS = ("results.json", "metrics.jsonl", "checkpoints", CONFIG_FILE)


@dataclass(frozen=True)
class ReportedRun:
    """A run in a report.

    Attributes:
        name: label and variant.
        folder: run folder; None of a collected result.
        config: of the run; None where there is none that can be read.
        result: of a finished run; None while it runs.
        records: of ``metrics.jsonl``, one history.
        state: the record of the newest complete checkpoint; None without one.
        opens_model: whether its model may be loaded, for heatmap and continuations.
    """

    name: RunName
    folder: Path | None
    config: RunConfig | None
    result: RunResult | None
    records: Sequence[Record]
    state: CheckpointState | None
    opens_model: bool = True

    @property
    def label(self) -> str:
        """Its name in the report."""
        return self.name.label

    @property
    def kind(self) -> str | None:
        """``model.kind``."""
        return self.config.model.kind if self.config is not None else self.result.model if self.result else None

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """The records of kind ``train``."""
        return [dict(record) for record in self.records if record["kind"] == "train"]

    @property
    def step(self) -> int | None:
        """The last step that is known of it."""
        if self.result is not None:
            return self.result.steps
        known = [self.train[-1]["step"]] if self.train else []
        return max([*known, *([self.state.step] if self.state is not None else [])], default=None)

    @property
    def tokens(self) -> int | None:
        """Tokens that it has trained on."""
        if self.result is not None:
            return self.result.tokens
        found = self.train[-1].get("tokens") if self.train else None
        return found if isinstance(found, int) else None

    @cached_property
    def parameters(self) -> int | None:
        """Number of trained parameters."""
        if self.result is not None:
            return self.result.parameters
        if self.config is None:
            return None
        model = build_model(self.config.model, seed=0, device="meta", heads=self.config.heads)
        return model.parameter_count()

    @property
    def classifies(self) -> bool:
        """Whether its main task is a classification."""
        if self.config is not None:
            return self.config.task.kind == "classification"
        return self.result is not None and self.result.tokens is None

    @property
    def seed(self) -> int:
        """``training.seed``, which pairs runs of two variants."""
        if self.result is not None:
            return self.result.seeds.get("training.seed", 0)
        return 0 if self.config is None else self.config.training.seed

    @property
    def main_sets(self) -> list[str]:
        """Names of the main task's validation sets, the one that chooses the checkpoint first."""
        if self.config is not None:
            names, chosen = list(self.config.data.validation), self.config.checkpoint.chosen_by
        elif self.result is not None:
            names, chosen = list(self.result.validation_data), self.result.keep_best
        else:
            names, chosen = [], None
        return sorted(names, key=lambda name: name != chosen)

    @property
    def main_tests(self) -> list[str]:
        """Names of the main task's test sets that it was measured on."""
        measured = [] if self.result is None else list(self.result.test)
        if self.config is None:
            return measured
        return [name for name in measured if name in self.config.data.test]

    def validation_of(self, name: str) -> tuple[int, Measures] | None:
        """Return step and measures of a validation set: of the tested checkpoint, or of the newest measurement."""
        if self.result is not None and (measured := self.result.validation.get(name)) is not None:
            for step, found in ((self.result.best.step, measured.best), (self.result.steps, measured.last)):
                if found is not None:
                    return step, found
        of_kind = [record for record in self.records if record["kind"] == f"evaluation/{name}"]
        if of_kind:
            last = of_kind[-1]
            return last["step"], {key: value for key, value in last.items() if key not in ("step", "kind")}
        if self.state is not None and name in self.state.validation:
            return self.state.step, {"loss": self.state.validation[name]}
        return None


def read_run(folder: Path, name: RunName, notes: Notes, opens_model: bool = True) -> ReportedRun:
    """Read the run in ``folder``, which ``check_run`` has found to be one; what is missing or damaged is noted."""
    try:
        result = read_result(folder)
    except UserError as error:
        notes.add(name.label, error)
        result = None
    complete = complete_checkpoints(folder / "checkpoints")
    state = None
    try:
        state = read_state(complete[-1]) if complete else None
    except UserError as error:
        notes.add(name.label, error)
    files = [path for path in (folder / CONFIG_FILE, *(path / CONFIG_FILE for path in complete[-1:])) if path.exists()]
    config = _read_config(files, name.label, notes)
    records = read_history(folder, name.label, notes)
    return ReportedRun(name, folder, config, result, records, state, opens_model)


def _read_config(files: Sequence[Path], label: str, notes: Notes) -> RunConfig | None:
    """Return the first config that can be read; a note says so where none can, as of a run of another version."""
    problem: UserError | None = None
    for path in files:
        try:
            return load_config(path)
        except UserError as error:
            problem = problem or error
    notes.add(label, "has no config.yaml" if problem is None else problem)
    return None


def read_collected(file: Path, name: RunName) -> ReportedRun | None:
    """Return a result that ``megachiar sweep --collect`` has copied; None where there is no such file.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    result = read_result_file(file)
    return None if result is None else ReportedRun(name, None, None, result, (), None, opens_model=False)


def check_run(folder: Path) -> None:
    """Check that a folder is that of a run.

    Raises:
        UserError: it is missing, or no run, or one checkpoint of a run.
    """
    with disk_errors(folder, "read"):
        if not folder.is_dir():
            raise UserError(folder, "there is no such folder", "give a run folder (logging.folder of its config)")
        if is_checkpoint(folder):
            raise UserError(folder, "is one checkpoint, and a report is about runs", f"give {folder.parent.parent}")
        if not any((folder / sign).exists() for sign in _SIGNS):
            problem = f"holds no run: none of {', '.join(_SIGNS)} is there"
            raise UserError(folder, problem, "give a run folder (logging.folder of its config)")
