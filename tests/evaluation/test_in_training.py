"""A run is asked tasks and prompts while it trains, which changes nothing of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_tasks import harness, write_tasks
from support import checkpoint_tensors, pretrain, write_config
from text_runs import text_config, write_text

from megachiar.checkpoint.format import complete_checkpoints, read_state
from megachiar.config.errors import ConfigError
from megachiar.config.load import parse_with_overrides
from megachiar.evaluation.in_training import measures_of
from megachiar.training.asked import NothingAsked
from megachiar.training.final_evaluation import best_of_each
from megachiar.training.metrics import read_metrics
from megachiar.training.owed_evaluation import owed_evaluations
from megachiar.training.run_result import read_result
from megachiar.training.samples_file import read_samples

harness()
TASKS = ("which_word", "last_word", "say_it")
PROMPTS = ("Document 7: the", "old ships")
BEST = ("eval/last_word/perplexity", "eval/last_word/acc", "valid")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = write_text(tmp_path_factory.mktemp("data"))
    write_tasks(folder / "tasks", documents=5)
    return folder


def asked(data: Path, run: Path, **sections: Any) -> dict[str, Any]:
    """Return the config of a run of 4 steps that is evaluated every 2."""
    keys: dict[str, Any] = {
        "evaluation": {
            "tasks": list(TASKS),
            "include_path": str(data / "tasks"),
            "at_start": True,
            "prompts": list(PROMPTS),
            "new_tokens": 6,
            "temperature": 0.7,
        },
        "training": {"steps": 4, "evaluate_every": 2},
        "checkpoint": {"every": 2, "keep": 1, "keep_best": list(BEST)},
        **sections,
    }
    return text_config(data, run, **keys)


@pytest.fixture(scope="module")
def alone(data) -> tuple[Path, str]:
    """A run of one process, and what it printed."""
    run = data / "alone"
    config = asked(data, run, logging={"folder": str(run), "tensorboard": True})
    return run, pretrain(write_config(data / "alone.yaml", config))[0]


def measures(run: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Return the values of each record of an evaluation by step and kind."""
    kinds = ("eval/", "evaluation/")
    found = {}
    for record in read_metrics(run):
        if record["kind"].startswith(kinds):
            key = record.pop("step"), record.pop("kind")
            assert key not in found, "nothing is measured twice"
            found[key] = record
    return found


def test_measures_and_samples_go_to_all_that_show_them(alone):
    run, printed = alone
    expected = [*(f"eval/{task}" for task in TASKS), "evaluation/valid"]
    assert sorted(measures(run)) == sorted((step, kind) for step in (0, 2, 4) for kind in expected)
    assert measures(run)[4, "eval/last_word"].keys() == {"perplexity", "acc"}
    samples = read_samples(run)
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(s, p) for s in (0, 2, 4) for p in PROMPTS]
    for sample in samples:
        assert repr(sample["text"])[1:-1] in printed
    assert printed.count("eval/last_word: perplexity") == 3 and "it/s" not in printed


def test_charts_have_measures_by_their_names_and_samples_as_text(alone):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(alone[0] / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("eval/last_word/perplexity")]
    recorded = [
        (step, found["perplexity"]) for (step, kind), found in measures(alone[0]).items() if kind == "eval/last_word"
    ]
    assert [step for step, _ in shown] == [0, 2, 4]
    assert dict(shown) == pytest.approx(dict(recorded))
    texts = events.Tensors("samples/1/text_summary")
    first = read_samples(alone[0])[0]
    assert [event.step for event in texts] == [0, 2, 4]
    assert first["text"].splitlines()[0] in texts[0].tensor_proto.string_val[0].decode()


def test_the_best_checkpoint_of_each_is_kept_and_the_result_names_it(alone):
    run, found = alone[0], measures(alone[0])
    result = read_result(run)
    by_step = {step: found[step, "eval/last_word"] for step in (0, 2, 4)}
    perplexities = {step: values["perplexity"] for step, values in by_step.items()}
    accuracies = {step: values["acc"] for step, values in by_step.items()}
    saved = {state.step: state for state in map(read_state, complete_checkpoints(run / "checkpoints"))}
    # The newest of equals is kept; step 0 has no checkpoint.
    best = {min((4, 2), key=perplexities.__getitem__), max((4, 2), key=accuracies.__getitem__)}
    best.add(min((4, 2), key=lambda step: found[step, "evaluation/valid"]["loss"]))
    assert set(saved) == best | {4}
    assert saved[4].validation["eval/last_word/acc"] == accuracies[4]
    assert set(saved[4].maximised) == {"eval/last_word/acc", "eval/which_word/acc", "eval/say_it/exact_match"}
    assert result.best.chosen_by == BEST[0] and result.best.step == min((4, 2), key=perplexities.__getitem__)
    assert result.best.value == perplexities[result.best.step] and result.best.loss is None
    of_each = result.best_of_each
    assert of_each["eval/last_word/perplexity"].value == min(perplexities.values())
    assert of_each["eval/last_word/acc"].value == max(accuracies.values())
    assert of_each["eval/last_word/acc"].higher_is_better and not of_each["valid"].higher_is_better
    assert result.tasks["eval/say_it"].last == found[4, "eval/say_it"]


def test_evaluation_changes_nothing_of_a_run_which_may_stop_and_go_on(alone, data):
    """The first half of another run asks nothing; its second half has the weights and answers of the run in one go."""
    run = data / "halves"
    nothing = asked(data, run, evaluation={}, checkpoint={"every": 2})
    pretrain(write_config(data / "half.yaml", nothing), "training.steps=2")
    pretrain(write_config(data / "halves.yaml", asked(data, run)))
    last = "checkpoints/step_00000004"
    assert checkpoint_tensors(run / last) == checkpoint_tensors(alone[0] / last)
    assert read_samples(run) == [sample for sample in read_samples(alone[0]) if sample["step"] == 4]
    expected = {key: values for key, values in measures(alone[0]).items() if key[0] == 4}
    assert {key: values for key, values in measures(run).items() if key[0] == 4} == expected


def test_two_ranks_measure_what_one_does(alone, data):
    run = data / "two"
    pretrain(write_config(data / "two.yaml", asked(data, run)), ranks=2)
    found, expected = measures(run), measures(alone[0])
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        if key[0] == 0 and key[1].startswith("eval/"):  # weights are the same, and so are the batches
            assert found[key] == values
        assert found[key] == pytest.approx(values, rel=1e-3)
    assert read_samples(run)[:2] == read_samples(alone[0])[:2]


def test_prompts_come_from_a_file_too(data, tmp_path):
    (tmp_path / "prompts.txt").write_text("old ships\n\n a lazy dog\n")
    config = asked(data, tmp_path / "run", evaluation={"prompts": str(tmp_path / "prompts.txt"), "new_tokens": 3})
    config["checkpoint"] = {}
    pretrain(write_config(tmp_path / "run.yaml", config), "training.steps=1")
    assert [sample["prompt"] for sample in read_samples(tmp_path / "run")] == ["old ships", " a lazy dog"]


@pytest.mark.parametrize(
    ("keep_best", "keys", "message"),
    [
        ("eval/last_word/akk", {}, "keep_best eval/last_word/akk: is measured by no task.*\n.*eval/last_word/acc"),
        (
            "eval/last_word/acc",
            {"metric_list": [{"metric": "acc", "higher_is_better": None}]},
            "keep_best eval/last_word/acc: has no best: its task does not say",
        ),
        ("eval/last_word/acc", {"num_fewshot": 99, "fewshot_split": "test"}, "tasks last_word: cannot be measured"),
        ("eval/last_word/acc", {"doc_to_target": "", "target_delimiter": ""}, "task last_word: the continuation ''"),
    ],
    ids=["no such measure", "no direction", "too few examples", "an empty answer"],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(keep_best, keys, message, data, tmp_path):
    path = write_tasks(tmp_path / "tasks", documents=5) / "last_word.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}, sort_keys=False))
    evaluation = {"tasks": ["last_word"], "include_path": str(tmp_path / "tasks")}
    checkpoint = {"keep_best": keep_best, "every": 2}
    config = asked(data, tmp_path / "run", evaluation=evaluation, checkpoint=checkpoint)
    (printed,) = pretrain(write_config(tmp_path / "run.yaml", config), codes=(2,))
    assert re.search(message, printed) and "Traceback" not in printed, printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"tensor_size": 2}}, "evaluation.tasks: is given, but parallel.tensor_size is 2"),
        ({"parallel": {"pipeline_size": 2}}, "evaluation.tasks: is given, but parallel.pipeline_size is 2"),
        ({"parallel": {"zero_stage": 3}}, "evaluation.tasks: is given, but parallel.zero_stage is 3"),
        (
            {"model": {"meta_router": {"pool": "batch"}}},
            "evaluation.tasks: is given, but model.meta_router.pool is batch",
        ),
        ({"task": {"kind": "classification", "classes": 2}}, "evaluation.tasks: is given, but task.kind"),
        ({"evaluation": {"tasks": [], "prompts": [], "include_path": "x"}}, "include_path: is given without"),
        ({"evaluation": {"tasks_every": 2}}, "tasks_every: is 2 without evaluation.tasks"),
        ({"evaluation": {}}, "checkpoint.keep_best: is eval/last_word/perplexity without evaluation.tasks"),
        ({"checkpoint": {"keep_best": ["valid", "test"]}}, "'test' is no set of data.validation"),
        ({"evaluation": {"tasks": ["last_word"], "limit": 1.5}}, "evaluation.limit"),
    ],
)
def test_configs_that_make_no_sense_are_refused(sections, message, data, tmp_path):
    with pytest.raises(ConfigError) as raised:
        parse_with_overrides(asked(data, tmp_path / "run", **sections), (), "test")
    assert message in str(raised.value)


def test_a_limit_may_be_a_share_of_the_documents(data, tmp_path):
    config = asked(data, tmp_path / "run", evaluation={"tasks": ["last_word"], "limit": 0.25}, checkpoint={})
    assert parse_with_overrides(config, (), "test").evaluation.limit == 0.25


def test_a_measure_that_no_task_of_the_run_has_any_more_has_no_best():
    """Nobody says which is better, and the lowest accuracy is none to be called the best."""
    records = [{"step": step, "kind": "eval/x", "acc": value} for step, value in ((2, 0.5), (4, 0.25))]
    records.append({"step": 4, "kind": "evaluation/valid", "loss": 2.0})
    assert best_of_each(records, NothingAsked()).keys() == {"valid"}


def test_a_metric_with_several_filters_keeps_them_apart():
    results = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "em,strict": 0.25,
        "em,loose": 1,
        "f1,none": "N/A",
    }
    assert measures_of(results) == {"acc": 0.5, "em/strict": 0.25, "em/loose": 1.0}
    assert measures_of({**results, "em,loose": math.inf}) == {"acc": 0.5, "em/strict": 0.25}, "of the same name"


def test_what_a_stop_has_put_off_is_known_until_it_is_made_up_for(tmp_path):
    records = [
        {"step": 2, "kind": "evaluation_owed", "names": ["valid", "eval/last_word", "samples"]},
        {"step": 2, "kind": "evaluation/valid", "loss": 1.0},
        {"step": 2, "kind": "eval/last_word", "acc": 1.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert owed_evaluations(tmp_path, 2) == ["samples"]
    path.write_text(path.read_text() + json.dumps({"step": 2, "kind": "samples", "count": 2}) + "\n")
    assert owed_evaluations(tmp_path, 2) == []
