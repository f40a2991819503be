"""A folder of text in which our own commands have worked: the text is read, what they wrote is left out and said so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from text_helpers import numbered_documents, run_tool, train, write_jsonl

from megachiar.data.inputs.documents import InvalidDocumentLog, ReadOptions
from megachiar.data.inputs.find_inputs import Inputs, find_inputs
from megachiar.data.inputs.readers import read_documents
from megachiar.data.preprocessing.corpus import Work, get_corpus
from megachiar.data.preprocessing.journal import Journal
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError

PARTS = ("train", "valid", "test")
RUN = Path(__file__).parents[2] / "fixtures" / "written_by_0.1.0" / "run"


def read_names(inputs: Inputs, folder: Path) -> list[str]:
    return [str(source.path.relative_to(folder)) for source in inputs.sources]


def reasons(inputs: Inputs) -> dict[str, str]:
    """What is said of each file that is left out."""
    (found,) = inputs.found
    return {file.name: file.reason for file in found.left_out}


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """A folder with a corpus of three files and its note, as `megachiar corpus` writes them without a network."""
    works = [Work(f"w{n}", "1", text, PARTS[n % 3]) for n, text in enumerate(numbered_documents(90))]
    monkeypatch.setattr("megachiar.data.preprocessing.corpus.shakespeare_and_milton", lambda say: (works, False))
    get_corpus("shakespeare", tmp_path / "corpus", print)
    return tmp_path / "corpus"


@pytest.mark.parametrize("suffix", [".model", ".json"])
def test_a_folder_is_read_again_after_the_steps_of_the_quick_start(corpus, suffix):
    tokenizer = corpus / f"tokenizer{suffix}"
    steps = [("train_tokenizer", "--input", corpus / "train.jsonl", "--vocab-size", 300, "--output", tokenizer)]
    for part in PARTS:
        output = ("--tokenizer", tokenizer, "--output-prefix", corpus / part, "--append-eod", "--workers", 1)
        steps.append(("preprocess_data", "--input", corpus / f"{part}.jsonl", *output))
    for step in steps:
        assert (done := run_tool(*step)).returncode == 0, done.stderr
    output = corpus.parent / "all"
    done = run_tool(
        "preprocess_data", "--input", corpus, "--tokenizer", tokenizer, "--output-prefix", output, "--workers", 1
    )
    assert done.returncode == 0, done.stderr
    dataset = "test.bin, test.idx, test.inputs, ... valid.json"
    assert done.stderr.splitlines()[:5] == [
        f"{corpus}: 3 files read (3 jsonl): test.jsonl, train.jsonl, valid.jsonl",
        f"{corpus}: 1 left out, a note that says how a tokenizer was made: {tokenizer.name}.made",
        f"{corpus}: 1 left out, a note that says how the corpus was made: corpus.made",
        f"{corpus}: 1 left out, a tokenizer, as the note beside it says: {tokenizer.name}",
        f"{corpus}: 12 left out, part of a tokenized dataset: {dataset}",
    ]
    assert IndexedDataset(output).documents == 90


def test_tokens_that_look_like_utf16_text_are_no_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    with IndexedDatasetBuilder(tmp_path / "a", "uint16") as builder:
        builder.add_document(np.frombuffer(b"tokens with the ids of ASCII letters " * 40, np.uint8))
    inputs = find_inputs([tmp_path])
    assert read_names(inputs, tmp_path) == ["a.jsonl"]
    assert reasons(inputs) == dict.fromkeys(("a.bin", "a.idx"), "part of a tokenized dataset")
    (tmp_path / "a.idx").unlink()
    with pytest.raises(UserError, match=r"a\.bin \(UTF-16LE text, suffix \.bin\)"):  # nothing says that it is ours
        find_inputs([tmp_path])


def test_a_manifest_is_no_data_whatever_the_key_of_the_text(tmp_path):
    tokenizer = train(tmp_path, "sentencepiece")
    output = ("--tokenizer", tokenizer, "--output-prefix", tmp_path / "out", "--workers", 1)
    assert run_tool("preprocess_data", "--input", tmp_path / "training.jsonl", *output).returncode == 0
    write_jsonl(tmp_path / "training.jsonl", ["x"], key="dtype")
    assert json.loads((tmp_path / "out.json").read_text())["dtype"] == "uint16"
    inputs = find_inputs([tmp_path], text_keys=["dtype"])
    assert read_names(inputs, tmp_path) == ["training.jsonl"]
    assert reasons(inputs)["out.json"] == "part of a tokenized dataset"


@pytest.mark.parametrize("with_journal", [True, False])
def test_what_an_unfinished_run_left_is_left_out(tmp_path, with_journal):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    builder = IndexedDatasetBuilder(tmp_path / "out", "uint16")
    builder.add_document(np.frombuffer(b"tokens with the ids of ASCII letters " * 40, np.uint8))
    builder.complete(lambda _: b"{}")
    builder.close()
    left = {"out.bin.tmp", "out.idx.tmp", "out.json.tmp", "out.starts.tmp"}
    if with_journal:
        Journal.open(tmp_path / "out.journal", {}).close()
        left.add("out.journal")
    inputs = find_inputs([tmp_path])
    assert read_names(inputs, tmp_path) == ["a.jsonl"]
    assert reasons(inputs) == dict.fromkeys(left, "part of an unfinished dataset")


def test_a_format_for_all_files_is_not_for_ours(tmp_path):
    (tmp_path / "part-0").write_text('{"text": "a"}\n')
    with IndexedDatasetBuilder(tmp_path / "out", "uint16") as builder:
        builder.add_document([1, 2])
    inputs = find_inputs([tmp_path], format="jsonl")
    log = InvalidDocumentLog()
    assert [document.text for document in read_documents(inputs.sources, ReadOptions(), log)] == ["a"]
    assert set(reasons(inputs)) == {"out.bin", "out.idx"}


def test_files_of_others_with_our_suffixes_are_judged_as_before(tmp_path):
    write_jsonl(tmp_path / "a.json", ["x"])
    (tmp_path / "a.idx").write_bytes(b"an index of something else")
    (tmp_path / "a.bin").write_bytes(b"\x00\x01\x02\x03")
    (tmp_path / "a.json.made").write_text("by hand")
    with pytest.raises(UserError, match=r"a\.json\.made \(\.made after a suffix of text\)"):
        find_inputs([tmp_path])
    (tmp_path / "a.json.made").unlink()
    inputs = find_inputs([tmp_path])
    assert read_names(inputs, tmp_path) == ["a.json"]
    assert reasons(inputs) == {"a.bin": "suffix .bin", "a.idx": "suffix .idx"}


def test_the_files_of_a_run_folder_are_left_out_and_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    shutil.copytree(RUN, tmp_path / "runs" / "tiny")
    (tmp_path / "runs" / "notes.txt").write_text("text beside the run")
    inputs = find_inputs([tmp_path])
    assert read_names(inputs, tmp_path) == ["a.jsonl", "runs/notes.txt"]
    own = {str(path.relative_to(tmp_path)) for path in (tmp_path / "runs" / "tiny").rglob("*") if path.is_file()}
    assert reasons(inputs) == dict.fromkeys(own, "part of a run folder")
    assert any(f"{len(own)} left out, part of a run folder: runs/tiny/" in line for line in inputs.found[0].lines())


def test_a_checkpoint_that_was_copied_out_of_its_run_is_left_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (checkpoint,) = (RUN / "checkpoints").iterdir()
    shutil.copytree(checkpoint, tmp_path / "best")
    own = {f"best/{path.name}" for path in checkpoint.iterdir()}
    assert reasons(find_inputs([tmp_path])) == dict.fromkeys(own, "part of a run folder")


def test_text_in_a_folder_in_which_a_run_works_is_read(tmp_path):
    shutil.copytree(RUN, tmp_path / "work")
    (tmp_path / "work" / "text.txt").write_text("text")
    inputs = find_inputs([tmp_path / "work"])
    assert read_names(inputs, tmp_path) == ["work/text.txt"]
    assert set(reasons(inputs).values()) == {"part of a run folder"}
    assert "metrics.jsonl" in reasons(inputs)


@pytest.mark.parametrize("inside", ["", "runs/tiny/"])
def test_text_in_a_run_folder_is_read_wherever_it_lies(tmp_path, inside):
    run = tmp_path / inside
    shutil.copytree(RUN, run, dirs_exist_ok=True)
    texts = ["state.jsonl", "config.yaml.txt", "checkpoints/a.jsonl", "tokenizer/notes.txt", "text/b.jsonl"]
    for name in texts:
        (run / name).parent.mkdir(exist_ok=True)
        write_jsonl(run / name, ["x"])
    assert sorted(read_names(find_inputs([tmp_path]), tmp_path)) == sorted(inside + name for name in texts)


@pytest.mark.parametrize("beside", ["tokenizer/", "checkpoints/", "tensorboard/", "metrics.jsonl", "state.json"])
def test_a_config_alone_makes_no_run_folder(tmp_path, beside):
    """Neither do empty folders and files of other programs under the names of ours."""
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(RUN / "config.yaml", copy)
    if beside.endswith("/"):
        (copy / beside).mkdir()
    else:
        write_jsonl(copy / beside, ["x"])
    write_jsonl(copy / "text.jsonl", ["x"])
    wanted = ["copy/text.jsonl"] + ([] if beside.endswith("/") else [f"copy/{beside}"])
    assert sorted(read_names(find_inputs([tmp_path]), tmp_path)) == sorted(wanted)


@pytest.mark.parametrize("config", ["model: gpt\n", "model:\n  kind: other\n"])
def test_metrics_beside_a_config_of_another_program_are_judged_as_any_file(tmp_path, config):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text(config)
    write_jsonl(tmp_path / "x" / "metrics.jsonl", ["text"])
    assert read_names(find_inputs([tmp_path]), tmp_path) == ["x/metrics.jsonl"]


@pytest.mark.parametrize("name", ["x.log", "x.done", "x.data", "x.jsonl_", "x"])
def test_records_with_text_are_refused_under_any_suffix_that_is_not_known(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    write_jsonl(tmp_path / name, ["y"])
    with pytest.raises(UserError, match=r"text data that cannot be read.*JSON, suffix"):
        find_inputs([tmp_path])


def test_a_log_is_left_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "x.log").write_text("12:00 began\n")
    write_jsonl(tmp_path / "y.log", ["y"], key="message")
    assert reasons(find_inputs([tmp_path])) == dict.fromkeys(["x.log", "y.log"], "suffix .log")


def test_files_of_trackers_and_profiles_in_a_run_folder_are_no_text(tmp_path):
    shutil.copytree(RUN, tmp_path / "work")
    own = ("trackers.json", "mlflow.db", "wandb/offline-run-1-a/files/config.json", "profile/steps_2-3_rank_0.json.gz")
    for name in own:
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("{}")
    (tmp_path / "work" / "text.txt").write_text("text")
    assert read_names(find_inputs([tmp_path / "work"]), tmp_path) == ["work/text.txt"]
