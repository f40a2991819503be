"""Fill the tables of docs/planning.md: the planner's step times beside published ones.

    python docs/generated_pages.py         fills them; a test fails where the page has other numbers

docs/planning/published_steps.csv has a row for each published number: the model, the layout, what the software did, and
the number in its source's unit. Where it is a rate of FLOPs, that is by the source's own count.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

from megachiar.config import RunConfig, parse_config
from megachiar.planning.clock import Software, StepTime, step_time
from megachiar.planning.gpus import GPUS
from megachiar.planning.rank_plan import plan_ranks

PAGE = Path(__file__).resolve().parent / "planning.md"
ROWS = PAGE.with_suffix("") / "published_steps.csv"
MARKED = re.compile(r"(<!-- clock: (\w+) -->\n).*?(<!-- end -->)", re.S)
GPUS_PER_NODE = 8
YES = {"yes": True, "no": False, "": None}
APART = 1.05
"""Two published speeds are taken for different where one is so many times the other; less is the spread of a run."""


@dataclass(frozen=True)
class Comparison:
    """A published step time and the planner's.

    Attributes:
        row: the line of the file.
        published: seconds.
        estimate: the planner's parts.
    """

    row: dict[str, str]
    published: float
    estimate: StepTime

    @property
    def error(self) -> float:
        """Return by what share the estimate is too long; negative where it is too short."""
        return self.estimate.total / self.published - 1

    @property
    def sets_constants(self) -> bool:
        """Return whether this row was one of those that the constants of a GPU were set by."""
        return self.row["sets_constants"] == "yes"

    @property
    def gpus(self) -> int:
        """Return the number of GPUs."""
        return int(self.row["tp"]) * int(self.row["pp"]) * int(self.row["dp"])


def layout_config(
    *,
    layers: int,
    hidden_size: int,
    heads: int,
    length: int,
    batch: int,
    vocabulary: int = 51200,
    ffn_size: int | None = None,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    micro_batch: int = 1,
    recompute: bool = True,
    zero: int = 1,
    sequence: bool = False,
) -> RunConfig:
    """Return the config of an attention-only model under a layout."""
    return parse_config(
        {
            "model": {
                "kind": "baseline",
                "num_layers": layers,
                "hidden_size": hidden_size,
                "num_attention_heads": heads,
                "ffn_hidden_size": ffn_size or 4 * hidden_size,
                "vocab_size": vocabulary,
                "max_sequence_length": length,
                "norm": "pre",
            },
            "data": {"train": [{"path": "data"}], "sequence_length": length},
            "parallel": {
                "tensor_size": tp,
                "pipeline_size": pp,
                "data_size": dp,
                "sequence": sequence,
                "zero_stage": zero,
            },
            "precision": {"compute": "bf16", "gradient_accumulation": "fp32"},
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"kind": "constant"},
            "training": {
                "steps": 1,
                "global_batch_size": batch,
                "micro_batch_size": micro_batch,
                "activation_checkpoint_interval": 1 if recompute else None,
            },
            "logging": {"folder": "run"},
        },
        "published_steps.csv",
    )


def compare(row: dict[str, str]) -> Comparison:
    """Estimate the step of a row of the file."""
    names = ("layers", "hidden_size", "heads", "ffn_size", "vocabulary", "length", "tp", "pp", "dp", "zero")
    config = layout_config(
        **{name: int(row[name]) for name in names},
        micro_batch=int(row["micro_batch"]),
        batch=int(row["batch"]),
        recompute=row["recompute"] == "yes",
        sequence=row["sequence"] == "yes",
    )
    software = Software(
        fused_attention=row["fused_attention"] == "yes",
        chunks=int(row["chunks"]),
        hides_data=float(row["hides_data"]) if row["hides_data"] else None,
        hides_tensor=float(row["hides_tensor"]),
        shares_cards=YES[row["shares_cards"]],
        splits_pipeline=row["splits_pipeline"] == "yes",
    )
    dp = int(row["dp"])
    estimate = step_time(config, dp, GPUS[row["gpu"]], GPUS_PER_NODE, plan_ranks(config, dp), software)
    return Comparison(row, published_seconds(row), estimate)


def published_seconds(row: dict[str, str]) -> float:
    """Return the published time of a step, from the number in its source's unit."""
    number, batch, length = float(row["published"]), int(row["batch"]), int(row["length"])
    gpus = int(row["tp"]) * int(row["pp"]) * int(row["dp"])
    if row["unit"] == "s":
        return number
    if row["unit"] == "tokens/s/GPU":
        return batch * length / number / gpus
    # Both of Megatron-LM's counts take attention for unmasked; that of 2021 has four passes, that of 2024 three.
    layers, d, passes = int(row["layers"]), int(row["hidden_size"]), 4 if "recomputed" in row["unit"] else 3
    layer = 24 * d * d + 4 * length * d
    flops = batch * length * (passes * layers * layer + 6 * d * int(row["vocabulary"]))
    return flops / gpus / number / 1e12


@cache
def comparisons() -> list[Comparison]:
    """Return the comparisons of all rows of the file."""
    with ROWS.open(newline="") as file:
        return [compare(row) for row in csv.DictReader(file)]


def median_error(rows: Iterable[Comparison]) -> float:
    """Return the median of the errors' sizes."""
    return statistics.median(abs(row.error) for row in rows)


def pairs_of_layouts(rows: Iterable[Comparison]) -> Iterator[tuple[Comparison, Comparison]]:
    """Yield pairs of layouts of one model on as many GPUs of one kind, the faster one first, that are told apart."""
    for a, b in combinations(rows, 2):
        keys = ("model", "gpu", "length")
        if any(a.row[key] != b.row[key] for key in keys) or a.gpus != b.gpus:
            continue
        fast, slow = sorted((a, b), key=lambda one: one.published / int(one.row["batch"]))
        if rate(fast, fast.published) >= APART * rate(slow, slow.published):
            yield fast, slow


def rate(one: Comparison, seconds: float) -> float:
    """Return the samples a second of a step that takes ``seconds``."""
    return int(one.row["batch"]) / seconds


def _sources() -> Iterator[str]:
    yield "| source | GPU | rows | median error | largest |"
    yield "|---|---|---|---|---|"
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in comparisons():
        groups.setdefault((one.row["source"], one.row["gpu"]), []).append(one)
    for (source, gpu), rows in groups.items():
        yield _summary(f"{source} | {gpu}", rows)
    held = [one for one in comparisons() if not one.sets_constants]
    yield _summary("rows that set constants | all", [one for one in comparisons() if one.sets_constants])
    yield _summary("**all other rows** | all", held)


def _summary(name: str, rows: list[Comparison]) -> str:
    worst = max((one.error for one in rows), key=abs)
    return f"| {name} | {len(rows)} | {median_error(rows):.1%} | {worst:+.1%} |"


def _rows() -> Iterator[str]:
    yield "| model | GPUs | tp, pp, dp | ZeRO | micro-batch, batch | recompute | published | estimate | error |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in comparisons():
        row = one.row
        if row["source"].startswith("MosaicML"):
            continue
        name = f"{row['model']}, {row['source']}{' *' if one.sets_constants else ''}"
        yield (
            f"| {name} | {one.gpus} {row['gpu']} | {row['tp']}, {row['pp']}, {row['dp']} | {row['zero']} "
            f"| {row['micro_batch']}, {row['batch']} | {row['recompute']} "
            f"| {one.published:.3g} s | {one.estimate.total:.3g} s | {one.error:+.1%} |"
        )


def _models() -> Iterator[str]:
    yield "| model | GPU | T | rows | GPUs | median error | largest |"
    yield "|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for one in comparisons():
        if one.row["source"].startswith("MosaicML"):
            groups.setdefault((one.row["model"], one.row["gpu"], one.row["length"]), []).append(one)
    for (model, gpu, length), rows in sorted(groups.items(), key=lambda item: (item[0][1], float(item[0][0][4:-1]))):
        gpus = [one.gpus for one in rows]
        span = f"{min(gpus)}" if min(gpus) == max(gpus) else f"{min(gpus)} to {max(gpus)}"
        worst = max((one.error for one in rows), key=abs)
        yield f"| {model} | {gpu} | {length} | {len(rows)} | {span} | {median_error(rows):.1%} | {worst:+.1%} |"


def _pairs() -> Iterator[str]:
    yield "| model | GPUs | faster | slower | published | estimate |"
    yield "|---|---|---|---|---|---|"
    for fast, slow in pairs_of_layouts(comparisons()):
        published = rate(fast, fast.published) / rate(slow, slow.published)
        estimate = rate(fast, fast.estimate.total) / rate(slow, slow.estimate.total)
        yield (
            f"| {fast.row['model']} | {fast.gpus} {fast.row['gpu']} | {_layout(fast)} | {_layout(slow)} "
            f"| {published:.2f}x | {estimate:.2f}x |"
        )


def _layout(one: Comparison) -> str:
    row = one.row
    words = [f"tp {row['tp']} pp {row['pp']} dp {row['dp']}", f"ZeRO {row['zero']}"]
    return ", ".join(words + ["recomputed"] * (row["recompute"] == "yes"))


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "sources": _sources,
    "rows": _rows,
    "models": _models,
    "pairs": _pairs,
}


def filled(text: str) -> str:
    """Return the page with its tables as the file and the planner have them."""
    return MARKED.sub(lambda match: "\n".join([match[1] + "", *TABLES[match[2]](), "", match[3]]), text)
