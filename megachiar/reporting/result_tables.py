"""The tables of single runs: the main results, every set that was measured, WikiText-2, and classification."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megachiar.reporting.measures import MEASURES, Values
from megachiar.reporting.table import Column, Row, Table, decimal, percent, short, text, whole

_WIKITEXT_2 = re.compile(r"wikitext[-_ ]?2(?![0-9])", re.I)
_MAIN_KEYS = (
    "run",
    "kind",
    "router",
    "seed",
    "parameters",
    "step",
    "steps",
    "finished",
    "tokens",
    *(f"{split}_{name}" for split in ("validation", "test") for name in ("set", "step", *MEASURES)),
    "attention_share",
    "flops_per_token",
    "attention_flops_per_token",
    "flops_saved",
    "training_seconds",
    "commit",
)
_SET_KEYS = ("run", "kind", "parameters", "split", "set", "data", "step", "tokens", "examples", *MEASURES)


def main_table(numbers: Sequence[Values]) -> Table:
    """Return the main results, a row for each run."""
    columns = [
        text("run", "run"),
        text("model", "kind"),
        text("router", "router"),
        short("parameters", "parameters"),
        Column("step", _progress),
        short("tokens", "tokens"),
        decimal("val. loss", "validation_loss", 4),
        decimal("val. PPL", "validation_token_ppl", 2),
        percent("val. accuracy", "validation_accuracy"),
        decimal("test loss", "test_loss", 4),
        decimal("test PPL", "test_token_ppl", 2),
        decimal("test word PPL", "test_word_ppl", 2),
        decimal("bits/byte", "test_bits_per_byte", 4),
        percent("test accuracy", "test_accuracy"),
        percent("attention", "attention_share"),
        short("FLOPs/token", "flops_per_token"),
        percent("FLOPs saved", "flops_saved"),
        whole("seconds", "training_seconds"),
        text("commit", "commit"),
    ]
    note = (
        "PPL is per token, word PPL per word. Test: weights of the checkpoint with the lowest validation loss. "
        "Attention: share of the routed layers' tokens. FLOPs: forward pass of the whole model; saved: against "
        "attention for every token in every layer."
    )
    return Table("main", "Main results", _MAIN_KEYS, numbers, columns, note)


def _progress(row: Row) -> str:
    if row.get("step") is None:
        return ""
    whole_run = row.get("steps")
    return f"{row['step']:,}" if row["finished"] or not whole_run else f"{row['step']:,} of {whole_run:,}"


def sets_table(rows: Sequence[Values]) -> Table:
    """Return the measures of every set, a row for each run and set."""
    columns = [
        *_who(rows),
        decimal("loss", "loss", 4),
        decimal("PPL", "token_ppl", 2),
        decimal("word PPL", "word_ppl", 2),
        decimal("bits/byte", "bits_per_byte", 4),
        percent("accuracy", "accuracy"),
        decimal("macro-F1", "macro_f1", 4),
    ]
    note = "Loss in nats a token, or a labelled sequence."
    return Table("sets", "All measured sets", _SET_KEYS, rows, columns, note)


def wikitext_2_table(rows: Sequence[Values]) -> Table:
    """Return the rows of sets of WikiText-2, which name or path tell."""
    found = [row for row in rows if is_wikitext_2(row) and "loss" in row and "accuracy" not in row]
    columns = [
        *_who(found),
        short("parameters", "parameters"),
        decimal("loss", "loss", 4),
        decimal("PPL", "token_ppl", 2),
        decimal("word PPL", "word_ppl", 2),
        decimal("bits/byte", "bits_per_byte", 4),
    ]
    note = "PPL is per token of the run's own tokenizer; only word PPL compares runs of different tokenizers."
    return Table("wikitext2", "WikiText-2", _SET_KEYS, found, columns, note)


def is_wikitext_2(row: Values) -> bool:
    """Return whether a row of ``all_sets`` is about WikiText-2, by the set's name or the last parts of its path."""
    path = "" if row.get("data") is None else "/".join(Path(row["data"]).parts[-2:])
    return any(_WIKITEXT_2.search(name) for name in (row["set"], path))


def classification_table(rows: Sequence[Values]) -> Table:
    """Return the rows of labelled sets."""
    found = [row for row in rows if "accuracy" in row]
    columns = [
        *_who(found),
        whole("examples", "examples"),
        decimal("loss", "loss", 4),
        percent("accuracy", "accuracy"),
        decimal("macro-F1", "macro_f1", 4),
    ]
    return Table("classification", "Classification", _SET_KEYS, found, columns)


def _who(rows: Sequence[Values]) -> list[Column]:
    columns = [text("run", "run"), text("model", "kind"), text("split", "split"), text("set", "set")]
    if len({Path(row["data"]).parent for row in rows if row.get("data") is not None}) > 1:
        columns.append(Column("data", _data, is_text=True))
    return [*columns, whole("step", "step")]


def _data(row: Row) -> str:
    return "" if row.get("data") is None else "/".join(Path(row["data"]).parts[-2:])
