"""Long-range tasks: answers and distances are found again in the tokens or the text, by rules of their own."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from hostile import refused

from megachiar.cli import corpus as command
from megachiar.data.tasks import long_range
from megachiar.data.tasks.copying import CopySettings, copying
from megachiar.data.tasks.listops_distance import ListOpsDistanceSettings, listops_distance
from megachiar.data.tasks.long_range import NAMES, VOCAB_SIZE
from megachiar.data.tasks.long_range_tasks import LONG_RANGE_TASKS
from megachiar.data.tasks.needle import NeedleSettings, needle
from megachiar.data.tasks.recall import RecallSettings, recall

pytestmark = pytest.mark.every_python
SMALL = {"seed": 3, "train": 60, "valid": 10, "test": 40}
RECORDED = {
    "recall": "b1658f21ed66b98d606fe50c1b465475fd7e9ebc31a12053657815934f87657c",
    "copy": "fa5ecc2a947d96f215a67dd2d88c20da54b772998178144ff65e1fa32aaabdda",
    "needle": "ff280bb6149799e7c2df179e88093a70b56d794f17baaa14f63a50ae34b588aa",
    "listops-distance": "c42cac4ea39f384b72399795e0ca3f6b48e1fbe464474fc41abcb6fbd803f3ec",
}


def drawn(name: str, **changes) -> list[tuple[str, dict]]:
    settings, draw = LONG_RANGE_TASKS[name]
    return list(draw(settings(**SMALL | changes)))


def words(record: dict) -> list[str]:
    """Return the words of an example, after a look at whether its ids are theirs."""
    found = record["text"].split(" ")
    ids = {".": 0, "k": 48, "v": 112}
    expected = []
    for word in found:
        if (numbered := re.fullmatch(r"([.kv])(\d+)", word)) is not None:
            expected.append(ids[numbered[1]] + int(numbered[2]))
        elif word.isdigit():
            expected.append(25 + int(word))
        else:
            expected.append({"#": 16, "?": 17, "=": 18, "[MIN": 20, "[MAX": 21, "[MED": 22, "[SM": 23, "]": 24}[word])
    assert expected == record["tokens"] and max(expected) < VOCAB_SIZE
    return found


# --- each task by a solver of its own ---------------------------------------------------------------------------------


def solve_recall(text: list[str]) -> list[list[int]]:
    """Read from left to right with a dictionary: what can be known of a value, and where it stood last."""
    known: dict[str, tuple[str, int]] = {}
    found = []
    for place, (before, word) in enumerate(itertools.pairwise(text), 1):
        if not before.startswith("k"):
            continue
        if before in known:
            value, where = known[before]
            assert value == word, "the last value of the key answers"
            found.append([place, place - where])
        known[before] = (word, place)
    return found


def solve_copy(text: list[str]) -> list[list[int]]:
    first, second = (place for place, word in enumerate(text) if word == "#")
    size = len(text) - second - 1
    assert text[first + 1 : first + 1 + size] == text[second + 1 :]
    assert all(word.startswith(".") for word in text[:first] + text[first + 1 + size : second])
    return [[place, second - first] for place in range(second + 1, len(text))]


def solve_needle(text: list[str]) -> list[list[int]]:
    *_, ask, key, answer = text
    facts = re.findall(r"= (k\d+) (v\d+)", " ".join(text))
    assert ask == "?" and dict(facts)[key] == answer and len(dict(facts)) == len(facts)
    fact = max(place for place in range(len(text) - 3) if text[place : place + 2] == ["=", key])
    return [[len(text) - 1, len(text) - 1 - (fact + 2)]]


def value_of(tokens: list[str]) -> tuple[int, list[int], list[int]]:
    """Evaluate the expression at the beginning of ``tokens``, by recursion; it is used up.

    Returns:
        Its value, the values of its arguments, and how many tokens each of these has.
    """
    head = tokens.pop(0)
    if not head.startswith("["):
        return int(head), [], []
    values, sizes = [], []
    while tokens[0] != "]":
        before = len(tokens)
        values.append(value_of(tokens)[0])
        sizes.append(before - len(tokens))
    tokens.pop(0)
    ranked = sorted(values)
    middle = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) // 2
    return {"[MIN": ranked[0], "[MAX": ranked[-1], "[MED": middle, "[SM": sum(ranked) % 10}[head], values, sizes


def solve_listops(text: list[str]) -> list[list[int]]:
    start = next(place for place, word in enumerate(text) if word.startswith("["))
    assert all(word.startswith(".") for word in text[:start])
    rest = text[start:]
    value, values, sizes = value_of(rest)
    assert rest == ["=", str(value)] and text[start] in ("[MIN", "[MAX")
    assert values.count(value) == 1, "one argument decides"
    decisive = values.index(value)
    assert sizes[decisive] == 1, "it is a digit"
    return [[len(text) - 1, 1 + sum(sizes[:decisive])]]


SOLVERS = {"recall": solve_recall, "copy": solve_copy, "needle": solve_needle, "listops-distance": solve_listops}


@pytest.mark.parametrize(
    "changes", [{}, {"length": 40, "fillers": 1}, {"length": 700}], ids=["default", "short", "long"]
)
@pytest.mark.parametrize("name", SOLVERS)
def test_answers_and_distances_are_those_that_a_reader_finds(name, changes):
    length = {"length": 128, **changes}["length"]
    parts = Counter()
    for part, record in drawn(name, **changes):
        parts[part] += 1
        text = words(record)
        assert len(text) == length and record["answers"] == SOLVERS[name](text) != []
    assert parts == {"test": 40, "valid": 10, "train": 60}


def depth_of(text: list[str]) -> int:
    depth = deepest = 0
    for word in text:
        depth += word.startswith("[")
        deepest = max(deepest, depth)
        depth -= word == "]"
    return deepest


def test_lists_are_nested_as_deep_as_is_allowed_and_deeper_where_distances_are_longer():
    examples = [(depth_of(words(record)), record["answers"][0][1]) for _, record in drawn("listops-distance", test=300)]
    assert max(depth for depth, _ in examples) == 4
    assert {depth_of(words(record)) for _, record in drawn("listops-distance", max_depth=1)} == {1}
    near, far = ([depth for depth, distance in examples if (distance > 60) == is_far] for is_far in (False, True))
    assert np.mean(far) > np.mean(near)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_octave_of_distances_has_its_share(name):
    """An octave that fits into the length is not rare, so that 2,000 examples give it a narrow interval."""
    octaves = Counter(d.bit_length() for _, record in drawn(name, test=600) for _, d in record["answers"])
    least, examples = {"recall": (2, 0.3), "copy": (4, 0.1), "needle": (2, 0.05), "listops-distance": (1, 0.1)}[name]
    assert set(octaves) == set(range(least, 8))
    assert min(octaves.values()) > examples * 600


@pytest.mark.parametrize(("depth", "distance"), [(0.0, 125), (1.0, 3), (0.5, 65)])
def test_a_needle_stands_where_it_is_asked_to(depth, distance):
    """128 tokens: a question of 3, and a fact that ends with token 3 at depth 0 and token 125 at depth 1."""
    found = {record["answers"][0][1] for _, record in needle(NeedleSettings(**SMALL, depth=depth))}
    assert found <= ({distance, distance - 1} if depth == 0.5 else {distance})


# --- seeds and parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_no_example_occurs_twice_in_one_part_or_in_two(name):
    examples = [tuple(record["tokens"]) for _, record in drawn(name, train=400)]
    assert len(set(examples)) == len(examples)


def test_few_possible_examples_are_drawn_once_each_or_refused(monkeypatch):
    """There are 4 strings of 2 tokens out of 2, and no room for fillers."""
    monkeypatch.setattr(long_range, "DRAWS_IN_VAIN", 200)
    four = {"seed": 0, "valid": 1, "test": 1, "length": 6, "string": 2, "values": 2}
    found = [tuple(record["tokens"][1:3]) for _, record in copying(CopySettings(**four, train=2))]
    assert sorted(found) == [(112, 112), (112, 113), (113, 112), (113, 113)]
    error = refused(lambda: list(copying(CopySettings(**four, train=3))))
    assert error is not None and error.where == "--train" and "2 of 3 were found" in str(error)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_seed_gives_the_same_examples_and_parts_do_not_depend_on_each_other(name):
    first = drawn(name)
    assert first == drawn(name) and first != drawn(name, seed=4)
    assert drawn(name, train=90)[: len(first)] == first
    fewer = [record for part, record in drawn(name, test=15) if part == "test"]
    assert fewer == [record for part, record in first if part == "test"][:15]


@pytest.mark.parametrize("name", SOLVERS)
def test_recorded_examples_stay_what_they_are(name):
    """A seed is a promise: the same examples on every Python and from now on."""
    content = json.dumps(drawn(name), separators=(",", ":")).encode()
    assert hashlib.sha256(content).hexdigest() == RECORDED[name]


@pytest.mark.parametrize(
    ("make", "where", "problem"),
    [
        (lambda: recall(RecallSettings(**SMALL, pairs=33)), "--pairs", "33 is not 1 to 32"),
        (lambda: recall(RecallSettings(**SMALL, keys=65)), "--keys", "65 is not 1 to 64"),
        (lambda: recall(RecallSettings(**SMALL, length=7)), "--length", "7 is not 8 or more"),
        (lambda: recall(RecallSettings(**SMALL | {"train": 0})), "--train", "0 is not 1 or more"),
        (lambda: recall(RecallSettings(**SMALL, fillers=17)), "--fillers", "17 is not 1 to 16"),
        (lambda: copying(CopySettings(**SMALL, string=64)), "--length", "no room for two strings of 64"),
        (lambda: needle(NeedleSettings(**SMALL, facts=21)), "--length", "21 facts would fill more than half"),
        (lambda: listops_distance(ListOpsDistanceSettings(**SMALL, max_depth=0)), "--max-depth", "0 is not 1 to 100"),
    ],
)
def test_settings_that_no_example_meets_are_refused(make, where, problem):
    error = refused(make)
    assert error is not None and error.where == where and problem in str(error)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_the_command_writes_three_files_once(name, tmp_path, capsys):
    arguments = [name, "--seed", "3", "--train", "60", "--valid", "10", "--test", "40", "--output", str(tmp_path)]
    command.main(arguments)
    for part in ("train", "valid", "test"):
        lines = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
        assert lines == [record for where, record in drawn(name) if where == part]
    assert "train.jsonl: 60 examples" in capsys.readouterr().err
    command.main(arguments)
    assert "nothing was done" in capsys.readouterr().err
    error = refused(lambda: command.main([*arguments, "--length", "99"]))
    assert error is not None and "exists already" in str(error)


def test_words_have_names_of_their_own():
    assert len(set(NAMES.values())) == len(NAMES) and max(NAMES) + 1 == VOCAB_SIZE
