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
    """Return the names of the validation sets whose evaluation after ``step`` was put off and not made up for since."""
    try:
        records = [record for record in read_metrics(run) if record["step"] == step]
    except UserError:  # there are no metrics, or none that can be read: nothing is known to be owed
        return []
    owed: list[str] = []
    for record in records:
        kind, names = record["kind"], record.get("names")
        if kind == KIND and isinstance(names, list) and all(isinstance(name, str) for name in names):
            owed = names
        elif kind.startswith("evaluation/"):
            owed = [name for name in owed if kind != f"evaluation/{name}"]
    return owed
