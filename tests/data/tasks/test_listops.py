"""ListOps: values by an evaluator of its own, the Arena's bounds, and the published flat lists number for number."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import random
import re
import statistics
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hostile import refused

from megachiar.cli import corpus as command
from megachiar.data.tasks import listops as listops_module
from megachiar.data.tasks.listops import ListOpsSettings, draw, listops
from megachiar.data.tasks.listops_flat import SEEDS, FlatSettings, flat_listops, lists
from megachiar.data.tasks.task_corpus import write_task
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python
SMALL = {"min_length": 5, "max_length": 60, "max_args": 4, "max_depth": 5}
HAND_MADE = {  # worked out by hand
    "[MAX 4 [MIN 2 3 ] 1 [MED 1 5 8 9 2 ] ]": 5,
    "[MED 1 2 ]": 1,
    "[MED 9 0 5 6 ]": 5,
    "[MED 0 9 ]": 4,
    "[SM 9 9 9 9 ]": 6,
    "[SM [MAX 1 7 ] [SM 5 5 ] 3 ]": 0,
    "[MIN [SM 8 3 ] 2 [MED 7 7 1 ] ]": 1,
    "7": 7,
}
RECORDED = "08fa09724e144f5c7e57e79e16276ce3e9b9e0ea59dd62312111ac24f4b8f579"
FUNCTIONS = {
    "MAX": lambda *digits: sorted(digits)[-1],
    "MIN": lambda *digits: sorted(digits)[0],
    "MED": lambda *digits: int(statistics.median(digits)),
    "SM": lambda *digits: int(np.add.reduce(digits) % 10),
}


def evaluate(text: str) -> int:
    """Return the value of an expression, as Python evaluates the calls that it is written as."""
    assert re.fullmatch(r"(\[(MAX|MIN|MED|SM)|\d|\])( (\[(MAX|MIN|MED|SM)|\d|\]))*", text)
    calls = re.sub(r"\[(\w+) ", r"\1(", text).replace(" ]", ")").replace(" ", ",")
    return eval(calls, {"__builtins__": {}}, FUNCTIONS)


def depth_of(text: str) -> int:
    """Return the depth of the deepest node; the outermost one has depth 1."""
    depth = deepest = 0
    for token in text.split():
        depth += token.startswith("[")
        deepest = max(deepest, depth + (token.isdigit()))
        depth -= token == "]"
    return deepest


def arguments_of(text: str) -> set[int]:
    """Return how many arguments the operators have."""
    counts: list[int] = [0]
    found = set()
    for token in text.split():
        if token == "]":
            found.add(counts.pop())
            continue
        counts[-1] += 1
        if token.startswith("["):
            counts.append(0)
    return found


@pytest.mark.parametrize(("text", "value"), HAND_MADE.items())
def test_the_oracle_has_the_values_of_hand_made_expressions(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize("changes", [SMALL, {}], ids=["small", "arena"])
def test_expressions_have_their_values_and_keep_to_the_bounds(changes):
    settings = ListOpsSettings(seed=3, train=60, valid=10, test=10, **changes)
    examples = list(listops(settings))
    parts = [part for part, _ in examples]
    assert {part: parts.count(part) for part in parts} == {"train": 60, "valid": 10, "test": 10}
    texts = [record["text"] for _, record in examples]
    assert len(set(texts)) == len(texts)
    for _, record in examples:
        tokens = record["text"].split(" ")
        assert evaluate(record["text"]) == record["label"] and 0 <= record["label"] <= 9
        assert settings.min_length < len(tokens) < settings.max_length
        assert depth_of(record["text"]) <= settings.max_depth
        assert arguments_of(record["text"]) <= set(range(2, settings.max_args + 1))
    everything = " ".join(texts)
    assert {"MAX", "MIN", "MED", "SM"} == set(re.findall(r"\[(\w+)", everything))
    assert max(map(depth_of, texts)) == settings.max_depth
    assert set().union(*map(arguments_of, texts)) == set(range(2, settings.max_args + 1))


def test_nodes_are_drawn_with_the_arenas_shares():
    """A quarter of the nodes above the largest depth are operators; arguments and digits are even."""
    settings = ListOpsSettings(seed=0, min_length=0, max_length=10_000, max_args=10, max_depth=3)
    texts = [draw(random.Random(f"{number}"), settings)[0] for number in range(8_000)]
    roots = sum(text.startswith("[") for text in texts) / len(texts)
    assert abs(roots - 0.25) < 0.02
    inner = [text.split() for text in texts if text.startswith("[")]
    arguments = [count for text in texts for count in arguments_of(text)]
    assert abs(np.mean([tokens[0] == "[SM" for tokens in inner]) - 0.25) < 0.05
    digits = np.bincount([int(token) for tokens in inner for token in tokens if token.isdigit()], minlength=10)
    assert digits.min() > 0.8 * digits.mean() and set(arguments) == set(range(2, 11))


def test_a_seed_gives_the_same_expressions_and_parts_do_not_depend_on_each_other():
    first = list(listops(ListOpsSettings(seed=3, train=20, valid=5, test=7, **SMALL)))
    assert first == list(listops(ListOpsSettings(seed=3, train=20, valid=5, test=7, **SMALL)))
    more = list(listops(ListOpsSettings(seed=3, train=40, valid=5, test=7, **SMALL)))
    assert more[: len(first)] == first
    smaller = list(listops(ListOpsSettings(seed=3, train=20, valid=5, test=4, **SMALL)))
    assert [x for x in smaller if x[0] == "test"] == [x for x in first if x[0] == "test"][:4]
    assert first != list(listops(ListOpsSettings(seed=4, train=20, valid=5, test=7, **SMALL)))


def test_recorded_expressions_stay_what_they_are():
    """A seed is a promise: the same expressions on every Python and from now on."""
    examples = list(listops(ListOpsSettings(seed=1, train=30, valid=5, test=5)))
    content = json.dumps(examples, separators=(",", ":")).encode()
    assert hashlib.sha256(content).hexdigest() == RECORDED


@pytest.mark.parametrize(
    ("changes", "where", "problem"),
    [
        ({"max_depth": 3}, "--max-depth", "3 with --max-args 10 gives at most 122 tokens"),
        ({"max_depth": 101}, "--max-depth", "101 is not 1 to 100"),
        ({"max_args": 1}, "--max-args", "1 is not 2 or more"),
        ({"train": 0}, "--train", "0 is not 1 or more"),
        ({"min_length": 500, "max_length": 501}, "--max-length", "more than 500 and fewer than 501"),
        ({"min_length": -1}, "--min-length", "-1 is not 0 or more"),
    ],
)
def test_settings_that_no_expression_meets_are_refused(changes, where, problem):
    with pytest.raises(UserError, match=problem) as caught:
        next(listops(ListOpsSettings(seed=0, **changes)))
    assert caught.value.where == where and caught.value.remedy


def test_more_expressions_than_there_are_end_in_an_error(monkeypatch):
    """At depth 1 there are ten: the digits."""
    monkeypatch.setattr(listops_module, "DRAWS_IN_VAIN", 1000)
    settings = ListOpsSettings(seed=0, train=6, valid=3, test=2, min_length=0, max_length=5, max_depth=1)
    with pytest.raises(UserError, match=r"1,000 expressions were drawn in a row.*5 of 6 were found") as caught:
        list(listops(settings))
    assert caught.value.where == "--train"


# --- the flat lists of the published code -----------------------------------------------------------------------------

# From the published generator itself, with its own padding to 11 ids.
PUBLISHED = {
    "train": (96_000, "5791396161fd95916551a2331073e0884997200ae640cf93ddad0493b966d563"),
    "test": (2_000, "04e019a6a4db5644711af46a196c9a0cba31a44c44b5a4668765c7a71779e252"),
}
FIRST = {"train": ([14, 12, 7, 4, 6, 9, 2, 6, 7, 15, 16], 5), "test": ([14, 11, 9, 8, 9, 8, 2, 4, 5, 15, 16], 2)}
LAST = {"train": ([14, 13, 2, 2, 5, 1, 15, 16, 16, 16, 16], 2), "test": ([14, 12, 2, 5, 1, 3, 2, 15, 16, 16, 16], 2)}


def padded(tokens: list[int]) -> list[int]:
    return tokens + [16] * (11 - len(tokens))


@pytest.fixture(scope="module")
def published_lists() -> dict[str, list[tuple[list[int], int]]]:
    return {part: list(lists(count, SEEDS[part])) for part, (count, _) in PUBLISHED.items()}


@pytest.mark.parametrize("part", PUBLISHED)
def test_flat_lists_are_the_published_ones_number_for_number(published_lists, part):
    count, digest = PUBLISHED[part]
    examples = [[padded(tokens), label] for tokens, label in published_lists[part]]
    assert len(examples) == count
    assert examples[0] == list(FIRST[part]) and examples[-1] == list(LAST[part])
    assert hashlib.sha256(json.dumps(examples, separators=(",", ":")).encode()).hexdigest() == digest


def test_flat_lists_beside_the_published_code(pytestconfig, monkeypatch):
    folder = pytestconfig.getoption("--published-code")
    if folder is None:
        pytest.skip("no --published-code")
    datasets = types.ModuleType("datasets")
    datasets.load_dataset = None
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    spec = importlib.util.spec_from_file_location("published_lra", folder / "data" / "lra.py")
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    for length in (11, 256):
        theirs = dict(
            zip(("train", "test"), published.load_listops(types.SimpleNamespace(max_seq_len=length)), strict=False)
        )
        settings = FlatSettings(pad_to=length)
        ours = {part: [] for part in SEEDS}
        for part, record in flat_listops(settings):
            ours[part].append((record["tokens"], record["label"]))
        for part, dataset in theirs.items():
            assert [(dataset.inputs[n].tolist(), int(dataset.labels[n])) for n in range(len(dataset))] == ours[part]


def test_labels_of_flat_lists_are_those_of_their_digits():
    for tokens, label in lists(3_000, 5):
        opening, operator, *digits, closing = tokens
        assert (opening, closing) == (14, 15) and 4 <= len(digits) <= 8 and 0 <= min(digits) <= max(digits) <= 9
        exact = {
            10: sorted(digits)[-1],
            11: sorted(digits)[0],
            12: int(statistics.fmean(digits)),
            13: int(statistics.median(digits)),
        }
        assert label == exact[operator]


def test_validation_is_apart_from_both_published_sets(published_lists):
    assert len(set(SEEDS.values())) == 3
    settings = FlatSettings(train=50, valid=20, test=10, pad_to=12)
    examples = list(flat_listops(settings))
    assert [part for part, _ in examples] == ["train"] * 50 + ["valid"] * 20 + ["test"] * 10
    assert all(len(record["tokens"]) == 12 and record["tokens"][-1] == 16 for _, record in examples)
    train, test = ([tokens for tokens, _ in published_lists[part]] for part in ("train", "test"))
    known = {tuple(tokens) for tokens in train}
    share = np.mean([tuple(tokens) in known for tokens in test])
    orders = {(tokens[1], tuple(sorted(tokens[2:-1]))) for tokens in train}
    any_order = np.mean([(tokens[1], tuple(sorted(tokens[2:-1]))) in orders for tokens in test])
    assert round(100 * share) == 9 and round(100 * any_order) == 70  # as the module and docs say


@pytest.mark.parametrize(
    ("changes", "where"), [({"pad_to": 10}, "--pad-to"), ({"test": 0}, "--test"), ({"train": -1}, "--train")]
)
def test_flat_settings_are_checked(changes, where):
    error = refused(lambda: list(flat_listops(FlatSettings(**{"train": 1, "valid": 1, "test": 1, **changes}))))
    assert error is not None and error.where == where


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_command_writes_three_files_once(tmp_path, capsys):
    small = ["--train", "30", "--valid", "4", "--test", "5", "--min-length", "5", "--max-length", "60"]
    arguments = ["listops", "--seed", "9", "--output", str(tmp_path / "out"), *small]
    command.main(arguments)
    expected = list(listops(ListOpsSettings(seed=9, train=30, valid=4, test=5, min_length=5, max_length=60)))
    for part in ("train", "valid", "test"):
        lines = [json.loads(line) for line in (tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()]
        assert lines == [record for where, record in expected if where == part]
    assert "train.jsonl: 30 examples" in capsys.readouterr().err
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    command.main(arguments)
    assert "nothing was done" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="exists already and holds another text") as caught:
        command.main([*arguments, "--max-args", "3"])
    assert "--overwrite" in caught.value.remedy
    command.main([*arguments, "--max-args", "3", "--overwrite"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "corpus.made",
        "test.jsonl",
        "train.jsonl",
        "valid.jsonl",
    ]


def test_the_command_writes_flat_lists(tmp_path, capsys):
    command.main(["listops-flat", "--train", "8", "--valid", "3", "--test", "2", "--output", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and padded(lines[0]["tokens"]) == FIRST["train"][0] and lines[0]["label"] == 5
    assert "test.jsonl: 2 examples" in capsys.readouterr().err


def test_a_task_that_does_not_exist_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="there is no such task") as caught:
        command.main(["listop", "--output", str(tmp_path)])
    assert "did you mean `megachiar corpus listops`?" in caught.value.remedy


def test_what_fails_in_the_middle_leaves_nothing(tmp_path):
    def examples():
        yield "train", {"text": "a", "label": 1}
        raise UserError("here", "is a problem", "mend it")

    output = tmp_path / "out"
    assert refused(lambda: write_task(examples, output, {"source": "x"}, stream=io.StringIO())) is not None
    assert list(output.iterdir()) == []
    only_train = [("train", {"text": "a", "label": 1})]
    error = refused(lambda: write_task(lambda: only_train, output, {"source": "x"}, stream=io.StringIO()))
    assert error is not None and error.where == "valid.jsonl" and list(output.iterdir()) == []


def test_inputs_that_were_touched_are_read_again(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("1")
    calls = []

    def examples():
        calls.append(source.read_text())
        return [(part, {"text": source.read_text(), "label": 1}) for part in ("train", "valid", "test")]

    def write(**options) -> bool:
        return write_task(examples, output, {"source": "x"}, inputs=[source], stream=io.StringIO(), **options).existed

    assert not write() and write() and calls == ["1"]
    source.write_text("2")
    assert refused(write) is not None and calls == ["1", "2"]
    assert not write(overwrite=True) and write()


def test_files_of_a_task_are_recognised_beside_text(tmp_path):
    command.main(["listops-flat", "--train", "8", "--valid", "3", "--test", "2", "--output", str(tmp_path)])
    assert Path(tmp_path / "corpus.made").read_text().split('"source": ')[1].startswith('"listops-flat"')
