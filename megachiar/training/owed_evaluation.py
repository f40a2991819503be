"""An evaluation that a stop has put off is owed: it is taken up first when the run goes on.

``metrics.jsonl`` holds it as a record ``{"step": 812, "kind": "evaluation_owed", "names": ["valid"]}``. A result is
written only of an evaluation that read all that it should.
"""

from __future__ import annotations

from pathlib import Path

from megachiar.errors import UserError
from megachiar.training.metrics import read_metrics

KIND = "evaluation_owed"


def owed_evaluations(run: Path, step: int) -> list[str]:
    """Return the names of what was to be evaluated after ``step``, was put off, and was not made up for since.

    These are validation sets, ``eval/TASK`` and ``samples``.
    """
    try:
        records = [record for record in read_metrics(run) if record["step"] == step]
    except UserError:  # there are no metrics, or none that can be read: nothing is known to be owed
        return []
    owed: list[str] = []
    for record in records:
        kind, names = record["kind"], record.get("names")
        if kind == KIND and isinstance(names, list) and all(isinstance(name, str) for name in names):
            owed = names
        else:  # a validation set's record is of the kind evaluation/NAME, that of a task or of samples has its name
            owed = [name for name in owed if kind not in (name, f"evaluation/{name}")]
    return owed
