"""``megachiar long-range``: hand-made models whose accuracy is known, and real runs beside ``megachiar evaluate``."""

from __future__ import annotations

import json
import math

import indexed_oracle as oracle
import numpy as np
import pytest
import torch
from hostile import refused
from scipy import stats
from support import forked_python, pretrain, small_config, write_config, write_tokens

from megachiar.analysis.long_range import (
    accuracy_by_distance,
    accuracy_of,
    design_effect,
    loss_by_position,
    mean_loss,
    measure_answers,
    wilson,
)
from megachiar.cli import corpus, evaluate
from megachiar.cli import long_range as command
from megachiar.cli import preprocess as preprocess_command
from megachiar.data.sampling.dataset import TokenSource, ValidationSet
from megachiar.data.tasks.answered import AnsweredSet
from megachiar.inference.loading import load_for_inference

VOCABULARY = ("--token-key", "tokens", "--vocab-size", "176")


def write_answered(prefix, documents, answers):
    """Write a dataset, and the lines that it was made of."""
    oracle.write(prefix, [[document] for document in documents])
    oracle.make_manifest(prefix, append_eod=False, vocab_size=176)
    lines = [json.dumps({"tokens": t, "answers": a}) for t, a in zip(documents, answers, strict=True)]
    prefix.with_name(f"{prefix.name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return prefix


def hand_made(folder):
    """Write 30 documents of 9 to 20 tokens with an answer at the end and one in the middle, at known distances."""
    rng = np.random.default_rng(0)
    documents, answers = [], []
    for number in range(30):
        length = 9 + number % 12
        documents.append(rng.integers(0, 176, length).tolist())
        answers.append([[4, 1 + number % 4], [length - 1, length - 1 - number % 3]])
    return write_answered(folder / "hand", documents, answers)


def test_accuracy_of_a_model_that_knows_some_answers_is_exactly_their_share(tmp_path):
    """It is right where the number of the document is divisible by 3, and has a loss of position / 7 nats."""
    dataset = AnsweredSet(TokenSource(hand_made(tmp_path)))
    asked = []

    def predict(inputs, targets, numbers):
        assert inputs.shape == targets.shape and len(numbers) == len(inputs) <= 4
        for row, number in enumerate(numbers):
            tokens = dataset.source.dataset.document(int(number))
            assert inputs[row].tolist() == tokens[:-1].tolist()
            assert {p + 1: t for p, t in enumerate(targets[row].tolist()) if t != -100} == {
                p: tokens[p] for p, _ in dataset.answers[number]
            }
            asked.append(int(number))
        nats = np.broadcast_to((np.arange(inputs.shape[1]) + 1) / 7, inputs.shape)
        return nats, np.broadcast_to(numbers[:, None] % 3 == 0, inputs.shape)

    answers = measure_answers(predict, dataset, batch_size=4)
    assert sorted(asked) == list(range(30)) and answers.document.tolist() == sorted([*range(30)] * 2)
    expected: dict[int, list[tuple[bool, float]]] = {}
    for number in range(30):
        for position, distance in ((4, 1 + number % 4), (8 + number % 12, 8 + number % 12 - number % 3)):
            octave = max(o for o in (1, 2, 4, 8, 16) if o <= distance)
            expected.setdefault(octave, []).append((number % 3 == 0, position / 7))
    found = accuracy_by_distance(answers)
    assert [part.least for part in found] == sorted(expected) and len(found) == 5
    for part in found:
        right, losses = zip(*expected[part.least], strict=True)
        assert (part.answers, part.right, part.most) == (len(right), sum(right), 2 * part.least - 1)
        assert part.accuracy == sum(right) / len(right) and part.low <= part.accuracy <= part.high
        assert part.loss == pytest.approx(np.mean(losses), rel=1e-12)
    whole = accuracy_of(answers)
    assert (whole.answers, whole.documents, whole.right, whole.accuracy) == (60, 30, 20, 1 / 3)


@pytest.mark.parametrize(("right", "answers"), [(0, 10), (1, 10), (7, 12), (99, 100), (40, 40)])
def test_intervals_are_wilsons(right, answers):
    low, high = stats.binomtest(right, answers).proportion_ci(0.95, method="wilson")
    assert wilson(right, answers) == pytest.approx((low, high), abs=2e-5)


def test_answers_that_are_right_together_count_once():
    """Copies that are whole or wrong have the interval of as many answers as there are documents, nearly."""
    right = np.array([5.0, 0, 5, 5, 0, 5, 5, 5, 0, 5] * 10)
    effect = design_effect(right, np.full(100, 5))
    assert effect == pytest.approx(5 * 100 / 99, rel=1e-9)
    assert wilson(350, 500, effect) == pytest.approx(wilson(70, 100, 100 / 99), rel=1e-9)
    independent = np.random.default_rng(1).binomial(5, 0.7, 400).astype(float)
    assert design_effect(independent, np.full(400, 5)) == pytest.approx(1, abs=0.25)
    assert design_effect(np.array([1.0, 0, 1]), np.ones(3, int)) == 1, "one answer a document"
    assert design_effect(np.full(7, 4.0), np.full(7, 4)) == 4, "all right: documents are counted"


def test_losses_by_position_are_weighted_means_with_errors_over_windows(tmp_path):
    tokens = np.random.default_rng(2).integers(0, 60, 10 * 12 + 6)
    dataset = ValidationSet(oracle.write_stream(tmp_path / "text", tokens), 12)
    table = np.random.default_rng(3).normal(size=(dataset.windows, 12)) ** 2

    def losses(inputs, targets, numbers):
        return np.where(targets == -100, 0.0, table[numbers])

    found = loss_by_position(losses, dataset, batch_size=4)
    assert [(part.least, part.most) for part in found] == [(1, 1), (2, 3), (4, 7), (8, 12)]
    seen = np.arange(dataset.windows * 12).reshape(-1, 12) < len(tokens) - 1
    assert not seen.all() and dataset.windows == 11
    for part in found:
        here, counted = (array[:, part.least - 1 : part.most] for array in (table, seen))
        values = here[counted]
        assert part.tokens == len(values) and part.loss == pytest.approx(values.mean(), rel=1e-12)
    first = table[:, 0]
    assert found[0].loss_error == pytest.approx(first.std(ddof=1) / math.sqrt(11), rel=1e-12)
    assert mean_loss(found) == pytest.approx(table[seen].mean(), rel=1e-12)


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recall examples of 32 tokens, a CHIAR run with random routes on them, and one that learns other tokens."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = ["--train", "60", "--valid", "10", "--test", "20"]
    corpus.main(["recall", *sizes, "--length", "33", "--output", str(folder)])
    corpus.main(["needle", *sizes, "--length", "60", "--output", str(folder / "far")])
    for prefix in ("train", "valid", "test", "far/test"):
        files = ["--input", str(folder / f"{prefix}.jsonl"), "--output-prefix", str(folder / prefix), "--workers", "1"]
        preprocess_command.main([*files, *VOCABULARY])
    router = {"kind": "random", "tau": None, "attention_share": 0.5}
    for name, model in (("run", {"router": router}), ("baseline", {"kind": "baseline", "router": {"tau": None}})):
        config = small_config(folder, training={"steps": 2})
        config["model"] |= {"vocab_size": 176} | model
        config["logging"]["folder"] = str(folder / name)
        pretrain(write_config(folder / f"{name}.yaml", config))
    other = folder / "other"
    other.mkdir()
    for part in ("train", "valid"):
        write_tokens(other / part)
    pretrain(write_config(other / "config.yaml", small_config(other, training={"steps": 1})))
    return folder


@pytest.fixture
def long_range(capsys):
    """Return what the command prints for its arguments, in this process."""

    def printed(*arguments: object) -> str:
        command.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize("length", [None, 20])
def test_losses_by_position_add_up_to_the_loss_of_evaluate(folder, long_range, capsys, length):
    options = [] if length is None else ["--sequence-length", length]
    printed = long_range(
        folder / "run", "--data", folder / "test", "--by", "position", "--json", "--batch-size", 3, *options
    )
    record = json.loads(printed)
    parts = record["positions"]
    assert [part["least"] for part in parts] == [1, 2, 4, 8, 16, 32][: 6 if length is None else 5]
    assert sum(part["tokens"] for part in parts) == 20 * 33 - 1
    weighted = sum(part["loss"] * part["tokens"] for part in parts) / (20 * 33 - 1)
    evaluate.main([str(word) for word in (folder / "run", "--data", folder / "test", "--json", *options)])
    expected = json.loads(capsys.readouterr().out)["loss"]
    assert weighted == pytest.approx(expected, abs=1e-6) and record["loss"] == pytest.approx(expected, abs=1e-6)


def test_answers_of_a_run_are_those_of_its_logits_whatever_the_batch(folder, long_range):
    """Each document is read by itself here, with the number that keys its random routes."""
    whole, parts = (
        json.loads(long_range(folder / "run", "--data", folder / "test", "--json", "--batch-size", size))
        for size in (32, 3)
    )
    assert whole["by"] == "distance" and whole["right"] == parts["right"]
    assert whole["loss"] == pytest.approx(parts["loss"], abs=1e-6)
    _, model, _ = load_for_inference(folder / "run")
    right, nats = {}, {}
    for number, line in enumerate((folder / "test.jsonl").read_text().splitlines()):
        example = json.loads(line)
        tokens = torch.tensor([example["tokens"]])
        with torch.inference_mode():
            chances = model(tokens[:, :-1], None, torch.tensor([number])).logits[0].double().softmax(-1)
        for position, distance in example["answers"]:
            octave = 2 ** int(math.log2(distance))
            answer = example["tokens"][position]
            right.setdefault(octave, []).append(int(chances[position - 1].argmax()) == answer)
            nats.setdefault(octave, []).append(-math.log(chances[position - 1, answer]))
    found = {part["least"]: part for part in whole["distances"]}
    assert found.keys() == right.keys() and whole["answers"] == sum(map(len, right.values()))
    for octave, part in found.items():
        assert (part["answers"], part["right"]) == (len(right[octave]), sum(right[octave]))
        assert part["loss"] == pytest.approx(np.mean(nats[octave]), abs=1e-5)


def test_several_runs_stand_beside_each_other(folder, long_range):
    runs = (folder / "run", folder / "baseline")
    printed = long_range(*runs, "--data", folder / "test")
    assert all(word in printed for word in ("accuracy by distance", "2-3", "16-31", "all"))
    results = json.loads(long_range(*runs, "--data", folder / "test", "--json"))["results"]
    assert [r["checkpoint"].rsplit("/", 3)[1] for r in results] == ["run", "baseline"]
    assert results[0]["loss"] != results[1]["loss"]
    assert "95 %" in long_range(folder / "run", "--data", folder / "test")
    assert "position" in long_range(folder / "run", "--data", folder / "test", "--by", "position")


# --- wrong inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("run", "--data", "far/test"), "more tokens before it than model.max_sequence_length 32"),
        (("other/run", "--data", "test"), "the model only 64"),
        (("run", "--data", "nothing"), "does not exist"),
        (("run", "--data", "test", "--sequence-length", "20"), "has no effect by distance"),
        (("run", "--data", "test", "--by", "position", "--sequence-length", "33"), "max_sequence_length 32"),
        (("run", "--data", "test", "--by", "position", "--answers", "test.jsonl"), "has no effect by position"),
        (("run", "--data", "test", "--answers", "valid.jsonl"), "valid.jsonl:1: is not document 0"),
        (("other/run", "--data", "other/train"), "train.jsonl: does not exist, so that no answer has a distance"),
    ],
)
def test_what_cannot_be_measured_is_one_error_with_a_remedy(folder, capsys, arguments, problem):
    def given(word: str) -> str:
        return word if word.startswith("-") or word.isdigit() or word == "position" else str(folder / word)

    error = refused(lambda: command.main([given(word) for word in arguments]))
    assert error is not None and problem in str(error) and capsys.readouterr().out == ""


def test_the_command_ends_with_code_2_and_no_traceback(folder):
    done = forked_python("tools/long_range.py", folder / "run", "--data", folder / "nothing")
    assert done.returncode == 2 and "remedy:" in done.stderr and "Traceback" not in done.stderr


GOOD = {"tokens": [5, 6, 5, 6], "answers": [[3, 2]]}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([GOOD], "has 1 lines, but"),
        ([GOOD, GOOD, GOOD], ":3: is not document 2"),
        ([GOOD, {"tokens": [5, 6, 5, 7], "answers": [[3, 2]]}], ":2: is not document 1"),
        ([{"tokens": [5, 6, 5, 6]}, GOOD], ":1: has no answers"),
        ([{"text": "a", "label": 1}, GOOD], ":1: has no tokens and no answers"),
        ([[1], GOOD], ":1: has no tokens and no answers"),
        (["{", GOOD], ":1: is no JSON"),
        *(
            ([GOOD | {"answers": answers}, GOOD], ":1: its answers are no list")
            for answers in (
                [],
                None,
                7,
                [[4, 1]],
                [[0, 1]],
                [[3, 0]],
                [[3, 4]],
                [[3, 1], [2, 1]],
                [[3]],
                [[3.0, 1]],
                [[True, 1]],
            )
        ),
    ],
)
def test_wrong_lines_are_refused(tmp_path, lines, problem):
    prefix = write_answered(tmp_path / "set", [GOOD["tokens"]] * 2, [GOOD["answers"]] * 2)
    assert AnsweredSet(TokenSource(prefix)).answers == [[(3, 2)]] * 2
    content = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (tmp_path / "set.jsonl").write_text(content)
    error = refused(lambda: AnsweredSet(TokenSource(prefix)))
    assert error is not None and problem in str(error)
