"""Runs that learn a classification, or several tasks: they learn, resume bit for bit, are measured and repeated."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled import CLASSES, write_examples
from support import checkpoint_tensors, forked_python, pretrain, small_config, write_config, write_tokens

from megachiar.checkpoint.format import read_state
from megachiar.config.load import parse_config
from megachiar.data.storage.reader import IndexedDataset
from megachiar.engine.confusion import confusion_matrix
from megachiar.errors import UserError
from megachiar.training.classification import evaluate_examples, summarise_confusion
from megachiar.training.metrics import read_metrics
from megachiar.training.run_data import open_data

MODEL = {"dropout": 0.1}
STRIDES = {"kind": "classification", "global_batch_size": 8, "classes": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    write_tokens(folder / "other", seed=2, documents=8)
    write_examples(folder / "examples", 200, vocab_size=16, longest=24)
    write_examples(folder / "held_out", 61, seed=1, vocab_size=16, longest=24)
    write_examples(folder / "unseen", 40, seed=2, vocab_size=16, longest=24)
    return folder


def classification(data: Path, run: Path, **training) -> dict:
    """Return the config of a classification run."""
    return small_config(
        run,
        model=MODEL,
        data={"train": [{"path": str(data / "examples")}], "validation": {"valid": str(data / "held_out")}},
        task={"kind": "classification", "classes": 3},
        training={"steps": 8, "global_batch_size": 8, "micro_batch_size": 4} | training,
    )


def mixed(data: Path, run: Path, **training) -> dict:
    """Return the config of a run that learns a language model, a classification and another language."""
    tasks = {
        "strides": {**STRIDES, "data": str(data / "examples"), "validation": str(data / "held_out")},
        "other": {"kind": "language_model", "data": str(data / "other"), "global_batch_size": 8},
    }
    return small_config(
        run,
        model=MODEL,
        data={"train": [{"path": str(data / "train")}], "validation": {"valid": str(data / "valid")}},
        mixed={"probability": 0.6, "group_size": 4, "tasks": tasks},
        training={"steps": 8, "global_batch_size": 8, "micro_batch_size": 4} | training,
    )


KINDS = {"classification": classification, "mixed": mixed}


def records(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_classification_is_learnt(data, tmp_path):
    config = classification(data, tmp_path, steps=250, global_batch_size=32, micro_batch_size=32)
    config["optimizer"] = {"learning_rate": 0.01}
    config["logging"]["every"] = 50
    config["model"]["dropout"] = 0.0
    pretrain(write_config(tmp_path / "config.yaml", config))
    (last,) = records(tmp_path, "evaluation/valid")
    assert last["accuracy"] > 0.9, last
    assert last["macro_f1"] > 0.9
    assert last["examples"] == 61
    assert records(tmp_path, "train")[-1]["tokens"] is None
    shown = forked_python("-m", "megachiar", "evaluate", tmp_path / "run", "--json").stdout
    assert json.loads(shown)["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert json.loads(shown)["accuracy"] == last["accuracy"]
    refused = forked_python("-m", "megachiar", "analyze-routing", tmp_path / "run")
    assert refused.returncode == 2 and "learns classes" in refused.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_whole_run_bit_for_bit(data, tmp_path, kind, ranks):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    pretrain(write_config(whole / "config.yaml", KINDS[kind](data, whole)), ranks=ranks)
    config = write_config(parts / "config.yaml", KINDS[kind](data, parts))
    pretrain(config, "schedule.decay_steps=8", "training.steps=3", ranks=ranks)
    pretrain(config, ranks=ranks)
    last = Path("run/checkpoints/step_00000008")
    assert checkpoint_tensors(whole / last) == checkpoint_tensors(parts / last)
    names = {"loss", "gradient_norm", "strides/loss", "other/loss", "strides/gate"}
    for one, other in zip(records(whole, "train"), records(parts, "train"), strict=True):
        assert {k: v for k, v in one.items() if k in names} == {k: v for k, v in other.items() if k in names}
    if kind == "mixed":
        assert any("strides/loss" in record for record in records(whole, "train"))
        assert [r["examples"] for r in records(whole, "evaluation/strides")] == [61]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_repeated(data, tmp_path, kind):
    pretrain(write_config(tmp_path / "config.yaml", KINDS[kind](data, tmp_path)), "checkpoint.every=3")
    shown = forked_python("-m", "megachiar", "replay", tmp_path / "run", "--step", "5", "--json")
    assert shown.returncode == 0, shown.stdout
    repeated = json.loads(shown.stdout)
    recorded = records(tmp_path, "train")[4]
    assert repeated["step"] == recorded["step"] == 5
    assert repeated["loss"] == pytest.approx(recorded["loss"], rel=1e-6)
    assert repeated["gradient_norm"] == pytest.approx(recorded["gradient_norm"], rel=1e-5)


def test_fine_tuning_starts_from_the_weights_of_a_language_model(data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    pretrain(write_config(first / "config.yaml", mixed(data, first) | {"mixed": {}}), "training.steps=2")
    config = write_config(second / "config.yaml", classification(data, second))
    (log,) = pretrain(
        config, f"checkpoint.load_from={first / 'run'}", "training.steps=1", "optimizer.learning_rate=1e-30"
    )
    assert "classification head main starts with initial weights" in log
    before, after = (checkpoint_tensors(p / f"run/checkpoints/step_0000000{n}") for p, n in ((first, 2), (second, 1)))
    common = [name for name in before if "classifiers" not in name and name.startswith("weights")]
    assert common
    assert all(before[name] == after[name] for name in common)


def test_a_head_for_classes_in_another_order_is_not_taken_over(data, tmp_path):
    from indexed_oracle import make_manifest

    from megachiar.data.storage.labels import write_labels

    pretrain(write_config(tmp_path / "config.yaml", classification(data, tmp_path)), "training.steps=2")
    prefix = write_examples(tmp_path / "turned", 20, vocab_size=16)
    make_manifest(prefix, append_eod=False, vocab_size=16)
    started = []
    for classes in (CLASSES, CLASSES[::-1]):
        write_labels(prefix, np.arange(20, dtype=np.int32) % 3, classes)
        run = tmp_path / classes[0]
        run.mkdir()
        config = classification(data, run)
        config["data"] = {"train": [{"path": str(prefix)}]}
        config["checkpoint"] = {"load_from": str(tmp_path / "run")}
        (log,) = pretrain(write_config(run / "config.yaml", config), "training.steps=1")
        started.append("classification head main starts with initial weights" in log)
    assert started == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {}, "mixed": {}}, "learns"),
        ({"task": {"kind": "classification", "classes": 4}}, "has 3 classes, but the config says 4"),
    ],
)
def test_another_task_is_refused(data, tmp_path, change, message):
    config = classification(data, tmp_path)
    pretrain(write_config(tmp_path / "config.yaml", config), "training.steps=2")
    (log,) = pretrain(write_config(tmp_path / "other.yaml", config | change), codes=[2])
    assert message in log
    assert "Traceback" not in log


def test_other_data_of_a_task_is_refused_or_told(data, tmp_path):
    config = mixed(data, tmp_path)
    pretrain(write_config(tmp_path / "config.yaml", config), "training.steps=2")
    write_examples(tmp_path / "others", 30, seed=9, vocab_size=16)
    other = f"mixed.tasks.strides.data={tmp_path / 'others'}"
    (log,) = pretrain(tmp_path / "config.yaml", other, codes=[2])
    assert "mixed.tasks.strides.data" in log
    (log,) = pretrain(tmp_path / "config.yaml", other, "data.on_change=continue")
    assert re.search(r"mixed\.tasks\.strides holds other data", log)


@pytest.mark.parametrize("layout", ["parallel.pipeline_size=2", "parallel.tensor_size=2"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_share_a_model_hold_the_same(data, tmp_path, kind, layout):
    """Ranks are compared before the first step and before each save, and a difference ends the run."""
    config = write_config(tmp_path / "config.yaml", KINDS[kind](data, tmp_path, steps=2))
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(config, f"logging.folder={one}")
    pretrain(config, layout, f"logging.folder={two}", ranks=2)
    losses = [[record["loss"] for record in read_metrics(run, "train")] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_other_draws_are_refused_or_each_task_goes_on_from_where_it_is(data, tmp_path):
    config = mixed(data, tmp_path)
    pretrain(write_config(tmp_path / "config.yaml", config), "training.steps=4")
    folder = tmp_path / "run/checkpoints"
    before = read_state(folder / "step_00000004").auxiliary_samples
    assert sum(before.values()) > 0
    for change in ("mixed.probability=1.0", "mixed.seed=5", "mixed.tasks.strides.global_batch_size=16"):
        (log,) = pretrain(tmp_path / "config.yaml", change, codes=[2])
        assert change.partition("=")[0] in log and "other batches would join the steps" in " ".join(log.split())
    changes = ["mixed.probability=1.0", "mixed.seed=5", "mixed.tasks.strides.global_batch_size=16"]
    pretrain(tmp_path / "config.yaml", *changes, "data.on_change=continue")
    after = read_state(folder / "step_00000008").auxiliary_samples
    batches = (after["strides"] - before["strides"]) / 16, (after["other"] - before["other"]) / 8
    assert sum(batches) == 4 * 2, "each of the two groups of a step has drawn a batch"
    assert all(count == int(count) >= 1 for count in batches)


def test_a_set_that_a_task_trains_on_is_told(data, tmp_path):
    config = mixed(data, tmp_path, steps=1)
    config["data"]["test"] = {"seen": str(data / "other")}
    config["mixed"]["tasks"]["strides"]["test"] = str(data / "examples")
    (log,) = pretrain(write_config(tmp_path / "config.yaml", config))
    told = " ".join(log.split())
    assert f"data.test.seen holds the same tokens as {data / 'other'}, which is trained on" in told
    assert f"mixed.tasks.strides.test holds the same tokens as {data / 'examples'}, which is trained on" in told


@pytest.mark.parametrize("kind", ["validation", "test"])
def test_two_sets_of_one_name_are_refused(data, tmp_path, kind):
    config = mixed(data, tmp_path)
    config["data"][kind] = {"strides": str(data / "valid")}
    config["mixed"]["tasks"]["strides"][kind] = str(data / "held_out")
    with pytest.raises(UserError, match=f"data.{kind} has a set named strides as well"):
        parse_config(config, "test")


def test_classes_in_another_order_are_refused(data, tmp_path):
    from indexed_oracle import make_manifest

    from megachiar.data.storage.labels import write_labels

    prefix = write_examples(tmp_path / "turned", 20, vocab_size=16)
    make_manifest(prefix, append_eod=False, vocab_size=16)
    write_labels(prefix, np.zeros(20, np.int32), CLASSES[::-1])
    config = classification(data, tmp_path)
    config["data"]["validation"] = {"valid": str(prefix)}
    with pytest.raises(UserError, match="has the classes faster, fast, slow"):
        open_data(parse_config(config, "test"))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_refuses_classes_in_another_order(data, tmp_path, kind):
    """With as many classes in another order every measure would be of wrong answers, and the exit code 0."""
    from indexed_oracle import make_manifest

    from megachiar.data.storage.labels import write_labels

    pretrain(write_config(tmp_path / "config.yaml", KINDS[kind](data, tmp_path, steps=1)))
    prefix = write_examples(tmp_path / "turned", 20, vocab_size=16)
    make_manifest(prefix, append_eod=False, vocab_size=16)
    task = ["--task", "strides"] if kind == "mixed" else []
    for classes, code in ((CLASSES, 0), (CLASSES[::-1], 2), (("slow", "fast", "other"), 2)):
        write_labels(prefix, np.zeros(20, np.int32), classes)
        done = forked_python("-m", "megachiar", "evaluate", tmp_path / "run", "--data", prefix, *task)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        if code:
            assert f"has the classes {', '.join(classes)}" in " ".join(done.stderr.split())
            assert f"--classes {','.join(CLASSES)}" in done.stderr


def test_an_epoch_reads_every_example_once(data, tmp_path):
    config = parse_config(classification(data, tmp_path), "test")
    stream = open_data(config).training
    for epoch in range(2):
        read = sorted(location.token for location in stream.locate(range(200 * epoch, 200 * epoch + 200)))
        assert read == list(range(200))
    assert [location.token for location in stream.locate(range(200))] != list(range(200))


def test_epochs_count_examples(data, tmp_path):
    config = classification(data, tmp_path)
    del config["training"]["steps"]
    config["training"]["epochs"] = 2
    (log,) = pretrain(write_config(tmp_path / "config.yaml", config), "training.global_batch_size=40")
    assert "10 steps" in log


def test_samples_are_cut_and_padded(data, tmp_path):
    config = classification(data, tmp_path)
    config["data"]["sequence_length"] = 10
    stream = open_data(parse_config(config, "test")).training
    source = stream.labelled[0]
    for location, row in zip(stream.locate(range(50)), stream.batch(range(50)), strict=True):
        tokens = source.dataset.document(location.token)[:10]
        assert row[:-1].tolist() == [*tokens.tolist(), *[-1] * (10 - len(tokens))]
        assert row[-1] == source.labels[location.token]


@pytest.mark.parametrize("kind", KINDS)
def test_examples_that_are_cut_are_told(data, tmp_path, kind):
    """Training, its dry run and evaluate tell them of every labelled set; where none is cut nothing is told."""
    config = KINDS[kind](data, tmp_path, steps=1)
    if kind == "mixed":
        config["mixed"]["tasks"]["strides"]["test"] = str(data / "unseen")
        keys = [f"mixed.tasks.strides.{name}" for name in ("data", "validation", "test")]
    else:
        config["data"]["test"] = {"last": str(data / "unseen")}
        keys = [f"data.train {data / 'examples'}", "data.validation.valid", "data.test.last"]
    path = write_config(tmp_path / "config.yaml", config)
    assert "are longer than" not in forked_python("-m", "megachiar", "pretrain", "--config", path, "--dry-run").stdout
    short = "data.sequence_length=10"
    (log,) = pretrain(path, short)
    planned = forked_python("-m", "megachiar", "pretrain", "--config", path, "--dry-run", "--set", short).stdout
    for key, name in zip(keys, ("examples", "held_out", "unseen"), strict=True):
        lengths = np.array(IndexedDataset(data / name).lengths)
        cut = lengths[lengths > 10]
        share = (cut - 10).sum() / cut.sum()
        said = f"{len(cut)} of {len(lengths)} examples are longer than"
        told = f"{key}: {said} data.sequence_length 10 and lose {share:.1%} of their tokens"
        assert told in " ".join(log.split()) and told in " ".join(planned.split())
        if name == "held_out":
            shown = forked_python("-m", "megachiar", "evaluate", tmp_path / "run", "--json")
            assert f"{said} the sequence length 10" in " ".join(shown.stderr.split()) and json.loads(shown.stdout)


def test_measures_of_a_confusion_matrix():
    """The numbers are scikit-learn's: accuracy_score, and f1_score with average="macro"."""
    confusion = np.array([[5, 1, 0, 0], [2, 3, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], float)
    measures = summarise_confusion(6.0, confusion, complete=True)
    assert (measures.examples, measures.loss) == (12, 0.5)
    assert measures.accuracy == pytest.approx(0.6666666666666666)
    assert measures.macro_f1 == pytest.approx(0.4564102564102564)


@pytest.mark.parametrize("ranks", [1, 2, 3, 70])
def test_every_example_is_classified_once(data, ranks):
    from megachiar.data.sampling.examples import ExampleSet, LabelledSource

    dataset = ExampleSet(LabelledSource(data / "held_out", 3, 16), 24, 0)
    sums: list[list[float]] = []

    def classify(samples: np.ndarray, task: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.from_numpy(samples[:, -1])
        return (labels >= 0).double().sum(), confusion_matrix(labels, labels.clamp_min(0), 3)

    for rank in range(ranks):
        evaluate_examples(
            classify, dataset, 4, rank=rank, ranks=ranks, reduce_sum=lambda v: sums.append(v) or [1.0] * 10
        )
    total = np.sum(sums, axis=0)
    assert total[0] == 61
    assert total[1:].reshape(3, 3).sum(1).tolist() == np.bincount(dataset.source.labels, minlength=3).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_tested_once_with_the_best_checkpoint(data, tmp_path, kind):
    config = KINDS[kind](data, tmp_path, evaluate_every=4)
    write_tokens(tmp_path / "test", seed=5, documents=4)
    write_examples(tmp_path / "examples", 17, seed=6, vocab_size=16, longest=24)
    if kind == "mixed":
        config["data"]["test"] = {"text": str(tmp_path / "test")}
        config["mixed"]["tasks"]["strides"]["test"] = str(tmp_path / "examples")
        config["checkpoint"] = {"keep_best": "strides", "every": 4}
    else:
        config["data"]["test"] = {"strides": str(tmp_path / "examples")}
        config["checkpoint"] = {"keep_best": "valid", "every": 4}
    pretrain(write_config(tmp_path / "config.yaml", config))
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    losses = {r["step"]: r["loss"] for r in records(tmp_path, f"evaluation/{config['checkpoint']['keep_best']}")}
    assert result["best"]["step"] == min(losses, key=losses.get)
    assert result["test"]["strides"]["examples"] == 17
    assert 0 <= result["test"]["strides"]["macro_f1"] <= result["test"]["strides"]["accuracy"] + 0.5
    assert ("token_ppl" in result["test"].get("text", {})) == (kind == "mixed")
    assert (result["tokens"] is None) == (kind == "classification")
    assert result["training_seconds"] > 0
    assert not records(tmp_path, "evaluation/text")


def test_a_part_of_a_labelled_dataset_is_read(data, tmp_path):
    config = classification(data, tmp_path)
    config["data"]["train"][0]["fraction"] = 0.1
    pretrain(write_config(tmp_path / "config.yaml", config), "checkpoint.every=3")
    stream = open_data(parse_config(config, "test")).training
    assert sorted(location.token for location in stream.locate(range(20))) == list(range(20))
    (train,) = json.loads((tmp_path / "run" / "results.json").read_text())["train"]
    assert train["examples"] == 20
    assert train["tokens"] == stream.labelled[0].dataset.token_of_document(20)
    shown = forked_python("-m", "megachiar", "replay", tmp_path / "run", "--step", "5", "--json")
    assert json.loads(shown.stdout)["loss"] == pytest.approx(records(tmp_path, "train")[4]["loss"], rel=1e-6)
