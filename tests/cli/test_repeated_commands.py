"""A command that was done before does nothing the second time; where an input or an option differs, it says which."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from text_helpers import numbered_documents, run_tool, write_jsonl, write_other_text

SAME = "exists already and is what this command makes: nothing was done"
OTHER = "exists already, and not as this command makes it:"


def state(folder: Path) -> dict[str, int]:
    """Time of change of each file under ``folder``."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def arguments_of(command: str, folder: Path) -> list[str | Path]:
    if command == "train_tokenizer":
        return ["--input", folder / "in.jsonl", "--vocab-size", "300", "--output", folder / "out.model"]
    if command == "merge_datasets":
        return [folder / "a", folder / "b", "--output", folder / "out"]
    name = command.partition(" ")[2] or "out"
    arguments = ["--tokenizer", folder / "tokenizer.json", "--output-prefix", folder / name, "--workers", "1"]
    return ["--input", folder / "in.jsonl", folder / "more.jsonl", *arguments, "--append-eod"]


COMMANDS = ("train_tokenizer", "preprocess_data", "merge_datasets")
CHANGES = {
    "train_tokenizer": (["--vocab-size", "310"], "it was made with vocab_size 300, this command has 310"),
    "preprocess_data": (["--shuffle-seed", "3"], "it was made with shuffle_seed None, this command has 3"),
    "merge_datasets": (["--shuffle-seed", "3"], "it was made with shuffle_seed None, this command has 3"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A corpus, a tokenizer and two datasets, all a minute old."""
    write_jsonl(tmp_path / "in.jsonl", numbered_documents(200))
    write_jsonl(tmp_path / "more.jsonl", numbered_documents(50))
    tokenizer = ["--vocab-size", "300", "--output", tmp_path / "tokenizer.json"]
    assert run_tool("train_tokenizer", "--input", tmp_path / "in.jsonl", *tokenizer).returncode == 0
    for name in ("a", "b"):
        done = run_tool("preprocess_data", *arguments_of(f"preprocess_data {name}", tmp_path))
        assert done.returncode == 0, done.stderr
    for path in tmp_path.iterdir():
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 60 * 10**9))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_command_again_does_nothing_and_says_so(folder, command):
    arguments = arguments_of(command, folder)
    first = run_tool(command, *arguments)
    assert first.returncode == 0 and SAME not in first.stdout + first.stderr, first.stderr
    before = state(folder)
    again = run_tool(command, *arguments)
    assert again.returncode == 0, again.stderr
    assert SAME in again.stdout + again.stderr
    assert state(folder) == before
    if command == "train_tokenizer":
        assert again.stderr.splitlines()[-2:-1] == first.stderr.splitlines()[-1:], "the same report"
    assert run_tool(command, *arguments, "--overwrite").returncode == 0
    assert state(folder) != before, "--overwrite makes it again"


@pytest.mark.parametrize("command", COMMANDS)
def test_another_option_is_refused_and_named(folder, command):
    arguments = arguments_of(command, folder)
    assert run_tool(command, *arguments).returncode == 0
    before = state(folder)
    more, reason = CHANGES[command]
    done = run_tool(command, *arguments, *more)
    assert done.returncode == 2 and f"{OTHER} {reason}" in done.stderr, done.stderr
    assert state(folder) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_input_with_other_text_is_another_input_and_one_with_new_times_is_not(folder, command):
    arguments = arguments_of(command, folder)
    assert run_tool(command, *arguments).returncode == 0
    changed = folder / ("b.bin" if command == "merge_datasets" else "in.jsonl")
    later = max(state(folder).values()) + 10**9
    os.utime(changed, ns=(later, later))
    done = run_tool(command, *arguments)
    assert done.returncode == 0 and SAME in done.stdout + done.stderr, done.stderr
    if command == "merge_datasets":
        changed.write_bytes(changed.read_bytes()[:-2] + b"\1\0")
    else:
        write_other_text(changed)
    done = run_tool(command, *arguments)
    assert done.returncode == 2 and OTHER in done.stderr and f"{changed} was changed since" in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["train_tokenizer", "preprocess_data"])
def test_an_older_file_that_was_moved_over_an_input_is_another_input(folder, command):
    """As ``mv``, ``cp -p``, ``rsync -a`` and ``tar x`` leave it: with other text, and times before the output's."""
    arguments = arguments_of(command, folder)
    assert run_tool(command, *arguments).returncode == 0
    older = write_jsonl(folder / "older.jsonl", numbered_documents(201))
    os.utime(older, ns=(0, 10**18))
    older.replace(folder / "in.jsonl")
    done = run_tool(command, *arguments)
    assert done.returncode == 2 and f"{OTHER} {folder / 'in.jsonl'} was changed since" in done.stderr, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_was_changed_since_is_not_what_the_command_makes(folder, command):
    arguments = arguments_of(command, folder)
    assert run_tool(command, *arguments).returncode == 0
    output = folder / ("out.model" if command == "train_tokenizer" else "out.bin")
    output.write_bytes(output.read_bytes()[:-2])
    done = run_tool(command, *arguments)
    assert done.returncode == 2 and f"{OTHER} " in done.stderr and output.name in done.stderr, done.stderr


def test_left_out_documents_count_as_left_out_only_where_that_is_allowed(folder):
    (folder / "more.jsonl").write_text("{broken\n")
    arguments = arguments_of("preprocess_data", folder)
    assert run_tool("preprocess_data", *arguments, "--on-error", "skip").returncode == 0
    again = run_tool("preprocess_data", *arguments, "--on-error", "skip")
    assert again.returncode == 0 and SAME in again.stderr and "skipped documents: 1 broken_json" in again.stderr
    strict = run_tool("preprocess_data", *arguments)
    assert strict.returncode == 2 and "made with --on-error skip and left documents out" in strict.stderr


def test_a_shard_of_a_dataset_that_is_whole_is_not_made(folder):
    arguments = arguments_of("preprocess_data", folder)
    assert run_tool("preprocess_data", *arguments).returncode == 0
    before = state(folder)
    for part in (["--shard", "1/2"], ["--merge-shards", "2"]):
        done = run_tool("preprocess_data", *arguments, *part)
        assert done.returncode == 0 and "nothing was done" in done.stderr, done.stderr
    assert state(folder) == before
