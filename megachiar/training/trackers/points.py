"""What trackers get of a record of ``metrics.jsonl``, under the names that people know from other stacks.

    {"step": 20, "kind": "train", "mean_loss": 3.1, "attention_share": [0, .4, .6, 1]}      a record
    step 20: loss 3.1, attention_share 0.5; layers: attention_share 0 .4 .6 1               its point

``NAMES`` is the one table of names. A value that it lacks keeps its own name.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NAMES = {
    "mean_loss": "loss",
    "learning_rate": "lr",
    "gradient_norm": "grad_norm",
    "model_flops_per_second": "flops_per_second",
    "model_flops_utilisation": "mfu",
    "bits_per_byte": "bpb",
    "token_ppl": "ppl",
    "step_seconds": "time/step",
    "data_seconds": "time/data",
    "forward_seconds": "time/forward",
    "backward_seconds": "time/backward",
    "optimizer_seconds": "time/optimizer",
    "communication_seconds": "time/communication",
}
"""Name in trackers by the name in ``metrics.jsonl``."""
AXES = ("elapsed_seconds", "tokens", "flops")
"""What a chart may have as its axis instead of the step; every point has them as far as they are known."""
_EVALUATION = "evaluation/"
_LEFT_OUT = {"train": {"loss"}, "samples": {"count"}, "evaluation": {"complete", "examples", "tokens"}}
"""Values that trackers do not get: the loss of the last step alone, beside the mean, and the size of a set."""


@dataclass(frozen=True)
class Point:
    """What a tracker gets at once.

    Attributes:
        step: optimizer steps taken.
        scalars: finite numbers by name.
        layers: one number a layer by name; 0 where a layer has none.
        texts: what the run has written, by name, in Markdown.
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    layers: dict[str, list[float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def histograms(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return a histogram for each list, as ``np.histogram`` does: the bin around n has the value of layer n."""
        return {
            f"{name}/layers": (np.array(values), np.arange(len(values) + 1) + 0.5)
            for name, values in self.layers.items()
        }


@dataclass(frozen=True)
class Naming:
    """What the names of a run's points depend on.

    Attributes:
        routed_layers: numbers of the layers that route, from 0; means over layers are means over these.
        validation: names of the validation sets. The first one's loss is ``val/loss``, those of the others
            ``val/NAME/loss``.
    """

    routed_layers: Sequence[int]
    validation: Sequence[str]

    def point(self, step: int, kind: str, values: Mapping[str, Any], axes: Mapping[str, float | None]) -> Point:
        """Return the point of a record.

        Args:
            step: of the record.
            kind: of the record.
            values: of the record: numbers, or lists with a number for each layer.
            axes: what the run has spent up to the record, by the names of ``AXES``; it may lack some.
        """
        prefix, left_out = self._place(kind)
        scalars: dict[str, float] = {}
        layers: dict[str, list[float]] = {}
        for key, value in values.items():
            name = prefix + NAMES.get(key, key)
            if key in left_out:
                continue
            if _is_finite(value):
                scalars[name] = value
            elif (
                isinstance(value, list)
                and value
                and all(item is None or isinstance(item, (int, float)) for item in value)
            ):
                layers[name] = [item if _is_finite(item) else 0.0 for item in value]
                routed = [value[i] for i in self.routed_layers if i < len(value) and _is_finite(value[i])]
                if routed:
                    scalars[name] = statistics.fmean(routed)
        if scalars or layers:
            scalars |= {name: value for name in AXES if (value := axes.get(name)) is not None and name not in scalars}
        return Point(step, scalars, layers)

    def _place(self, kind: str) -> tuple[str, set[str]]:
        """Return what stands before the names of a kind, and the values that are left out."""
        if kind == "train":
            return "", _LEFT_OUT["train"]
        if not kind.startswith(_EVALUATION):
            return f"{kind}/", _LEFT_OUT.get(kind, set())
        name = kind.removeprefix(_EVALUATION)
        is_first = bool(self.validation) and name == self.validation[0]
        return "val/" if is_first else f"val/{name}/", _LEFT_OUT["evaluation"]


def point_of_samples(step: int, samples: Sequence[tuple[str, str]]) -> Point:
    """Return the point of prompts and their continuations: texts ``samples/1``, ``samples/2`` and so on."""
    texts = {
        f"samples/{number}": "".join(f"    {line}\n" for line in f"{prompt} ▸{text}".splitlines())
        for number, (prompt, text) in enumerate(samples, 1)
    }
    return Point(step, texts=texts)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
