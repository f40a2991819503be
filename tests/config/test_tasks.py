"""The sections ``task:`` and ``mixed:``: what they refuse, and what they make of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import small_config

from megachiar.config import ConfigError, load_config
from megachiar.config.load import parse_with_overrides
from megachiar.config.tasks import HeadConfig
from megachiar.topology import LaunchError, data_parallel_size

IMDB = "{kind: classification, classes: 2, data: d, global_batch_size: 8}"
MIXED = ["mixed.group_size=4", f"mixed.tasks.imdb={IMDB}"]
CLASSIFICATION = ["task.kind=classification", "task.classes=3"]
WRONG = [
    (["task.kind=classification"], "task.classes", "is missing"),
    (["task.kind=classification", "task.classes=1"], "task.classes", "greater than or equal to 2"),
    (["task.classes=3"], "task.classes", "has no effect"),
    (["task.head=mlp"], "task.head", "has no effect"),
    ([*CLASSIFICATION, "data.order=megatron"], "data.order", "is megatron"),
    ([*CLASSIFICATION, "data.document_mask=true"], "data.document_mask", "one document"),
    ([*CLASSIFICATION, *MIXED], "mixed.tasks", "join a language model"),
    (["mixed.probability=0.5"], "mixed.probability", "has no effect"),
    ([MIXED[1]], "mixed.group_size", "is missing"),
    (["mixed.group_size=3", MIXED[1]], "mixed.group_size", "does not divide"),
    (["mixed.probability=1.5", *MIXED], "mixed.probability", "less than or equal to 1"),
    ([*MIXED, "mixed.tasks.imdb.classes=null"], "mixed.tasks.imdb.classes", "is missing"),
    ([*MIXED, "mixed.tasks.imdb.kind=language_model"], "mixed.tasks.imdb.classes", "has no effect"),
    ([*MIXED, "mixed.tasks.imdb.global_batch_size=3"], "mixed.tasks.imdb.global_batch_size", "no multiple"),
    ([*MIXED, "mixed.tasks.imdb.weight=0"], "mixed.tasks.imdb.weight", "greater than 0"),
    ([*MIXED, f"mixed.tasks.main={IMDB}"], "mixed.tasks.main", "cannot be the name of a task"),
    ([*MIXED, "mixed.tasks.valid={kind: language_model, data: d, validation: v, global_batch_size: 8}"],
     "mixed.tasks.valid.validation", "data.validation has a set"),
    ([*MIXED, "mixed.tasks.imdb.speed=3"], "mixed.tasks.imdb.speed", "is not a known key"),
]  # fmt: skip


def read(*overrides: str):
    return parse_with_overrides(small_config(Path("folder")), list(overrides), "test")


@pytest.mark.parametrize(("overrides", "key", "message"), WRONG, ids=[f"{key}-{part}" for _, key, part in WRONG])
def test_what_makes_no_run_is_refused(overrides, key, message):
    with pytest.raises(ConfigError) as raised:
        read(*overrides)
    lines = [line for line in str(raised.value).splitlines() if key in line]
    assert any(message in line for line in lines), str(raised.value)


def test_tasks_and_heads_of_a_run():
    assert [task.name for task in read().tasks] == ["main"]
    assert read().heads == {}
    assert read(*CLASSIFICATION, "task.head=mlp").heads == {"main": HeadConfig(3, "mlp", "masked")}
    mixed = read(*MIXED, "mixed.tasks.a={kind: language_model, data: x, global_batch_size: 8}")
    assert [task.name for task in mixed.tasks] == ["main", "a", "imdb"], "tasks come in the order of their names"
    assert mixed.heads == {"imdb": HeadConfig(2, "linear", "masked")}


def test_a_resolved_config_reads_back(tmp_path):
    mixed = read(*MIXED, "mixed.tasks.imdb.padding=counted")
    (tmp_path / "config.yaml").write_text(mixed.to_yaml())
    assert load_config(tmp_path / "config.yaml") == mixed


def test_ranks_must_divide_the_batch_of_each_task():
    mixed = read(*MIXED)
    assert data_parallel_size(mixed, 4) == 4
    eight = read(*MIXED, "training.global_batch_size=16", "training.micro_batch_size=2")
    with pytest.raises(LaunchError, match=r"mixed\.tasks\.imdb\.global_batch_size"):
        data_parallel_size(eight, 8)
