"""The table of a device check: one row for each layer, operator and contender that was timed, and for what was not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megachiar.benchmark import Spread

_COLUMNS = (
    "part",
    "what",
    "ms (quartiles)",
    "of the dense one's speed",
    "GPU busy, ms",
    "launches",
    "host, ms",
    "GPU waits",
    "MFU",
)
_BASELINE = "baseline bf16"


def table(record: dict[str, Any]) -> str:
    """Return a check's record as a page of Markdown with one table."""
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items() if value is not None)
    title = "# Rehearsal of the device check: tiny sizes on a CPU, no number means anything"
    lines = [title if record["rehearsal"] else "# Device check", "", f"{machine}.", ""]
    lines += [_row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    for part in record["parts"]:
        rows = list(_rows_of(part))
        if part["state"] != "done":
            rows.append([f"{part['state']}: {_last_line(part['error'])}"])
        lines += [_row([part["name"], *cells, *[""] * (len(_COLUMNS) - 1 - len(cells))]) for cells in rows]
    return "\n".join([*lines, ""])


def _row(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _last_line(error: str | None) -> str:
    """Return the last line of messages, which says what an exception was."""
    return (error or "").strip().rpartition("\n")[2] or "without a message"


def _rows_of(part: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells, behind the name, of each row of a part."""
    result = part["result"]
    if result is None:
        return
    if part["kind"] == "tests":
        wrong = result["failures"] + result["errors"]
        yield [f"{result['tests'] - wrong - result['skipped']} passed, {wrong} failed, {result['skipped']} skipped"]
    elif part["kind"] == "layers":
        for length, found in result["lengths"].items():
            for name, entry in {**found["layers"], **found["operators"]}.items():
                ratio = entry["speed_up"] if name in found["layers"] else None
                yield [f"T {length}, {name}", *_times(entry, ratio)]
    else:
        sizes = result["options"]
        shape = f"{sizes['layers']} layers, d {sizes['hidden_size']}, {sizes['batch']} x {sizes['sequence_length']}"
        for name, entry in result["contenders"].items():
            yield [f"{shape}, {name}", *_times(entry, entry["speed_up"].get(_BASELINE))]


def _times(entry: dict[str, Any], ratio: list[float] | None) -> list[str]:
    """Return the cells of what was timed, from the column of its time on."""
    activity = entry.get("activity", {})
    busy, launches, host = (activity.get(name) for name in ("busy_seconds", "launches", "host_seconds"))
    waits, utilisation = entry.get("gpu_waits"), entry.get("model_flops_utilisation")
    return [
        Spread.of(entry["seconds"]).format("", 1e3, 2),
        f"{ratio[0]:.2f}x" if ratio is not None else "",
        f"{busy * 1e3:.2f}" if busy is not None else "",
        f"{launches:.0f}" if launches is not None else "",
        f"{host * 1e3:.2f}" if host is not None else "",
        f"{waits:.0%}" if waits is not None else "",
        f"{utilisation:.1%}" if utilisation is not None else "",
    ]
