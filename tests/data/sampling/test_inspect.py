"""Inspection: what it says is so, what it proves it proves, and text comes out as it went in."""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest

from megachiar.data.sampling.dataset import build_training_samples
from megachiar.data.sampling.inspection import find_tokenizer, show_document, show_sample, summarise
from megachiar.data.storage import reader
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python

TOOL = Path(__file__).parents[3] / "tools" / "inspect_dataset.py"
TEXTS = ["Now is the winter of our discontent", "made glorious summer", "by this sun of York; naïve – 日本"]


def train_tokenizer(path: Path, texts: list[str]) -> None:
    """A byte-level BPE of a few hundred ids, without a hub."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``text``: a dataset of TEXTS with manifest and tokenizer; ``bare``: one of another program, without."""
    folder = tmp_path_factory.mktemp("inspect")
    train_tokenizer(folder / "tokenizer.json", TEXTS)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    with IndexedDatasetBuilder(folder / "text", "uint16") as builder:
        for text in TEXTS:
            builder.add_document([*tokenizer.encode(text), tokenizer.eod_id])
    oracle.make_manifest(
        folder / "text",
        kind=tokenizer.kind,
        file="tokenizer.json",
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
    )
    oracle.write(folder / "bare", [[[1, 2], [3]], [[4, 299]], [[]]], "int32")
    return folder


@pytest.fixture
def tokenizer(folder) -> Tokenizer:
    return find_tokenizer(folder / "text", None)


def test_summary_of_a_dataset_without_manifest(folder):
    summary = summarise(folder / "bare")
    assert summary["dtype"] == "int32"
    assert (summary["documents"], summary["sequences"], summary["tokens"]) == (3, 4, 5)
    assert summary["document_tokens"] == {"smallest": 0, "mean": pytest.approx(5 / 3), "median": 2.0, "largest": 3}
    assert summary["files"] == {str(folder / "bare.bin"): 20, str(folder / "bare.idx"): 34 + 12 * 4 + 8 * 4}
    assert summary["manifest"] is None and "largest_token_id" not in summary
    assert [what.split(":")[0] for what in summary["not_checked"]] == [
        "every row of the index, and the tokens themselves",
        "checksums, tokenizer and text",
    ]


def test_verifying_proves_more_and_says_so(folder):
    read: list[int] = []
    bare, text = summarise(folder / "bare", verify=True), summarise(folder / "text", verify=True, on_bytes=read.append)
    assert (bare["smallest_token_id"], bare["largest_token_id"]) == (1, 299)
    assert bare["verified"] == ["header", "sizes", "counts", "index"] and len(bare["not_checked"]) == 1
    assert text["verified"] == ["header", "sizes", "counts", "index", "checksums"] and text["not_checked"] == []
    assert sum(read) == sum(text["files"].values())


def test_verifying_finds_what_opening_cannot(tmp_path):
    prefix = oracle.write(tmp_path / "a", [[[1, 2, 3]]], "int32")
    oracle.make_manifest(prefix, largest_token_id=7)
    summarise(prefix)
    with pytest.raises(UserError, match="records largest_token_id 7, but the file holds 3"):
        summarise(prefix, verify=True)
    oracle.make_manifest(prefix, checksums={"bin": [hashlib.sha256(b"other").hexdigest()], "idx": ["ab" * 32]})
    with pytest.raises(UserError, match=f"but its manifest records {'ab' * 32}"):
        summarise(prefix, verify=True)
    oracle.write(tmp_path / "b", [[[1, -2, 3]]], "int32")
    with pytest.raises(UserError, match="holds the id -2"):
        summarise(tmp_path / "b", verify=True)


def test_verifying_checks_every_row_of_a_long_index(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "ROWS_CHECKED_ON_OPEN", 256)
    prefix = oracle.write(tmp_path / "a", [[[1]]] * 2_000)
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(34 + 4 * 2_000 + 8 * 3)  # the pointer of sequence 3; the blocks checked begin at 0, 7, 15, ...
        file.write(b"\x09")
    summarise(prefix)
    with pytest.raises(UserError, match="sequence 3 has length 1 and begins at byte 9"):
        summarise(prefix, verify=True)


def test_documents_come_out_as_they_went_in(folder, tokenizer):
    for number, text in enumerate(TEXTS):
        shown = show_document(folder / "text", number, tokenizer)
        assert shown["text"].removesuffix("<|endoftext|>") == text
        assert shown["ids"] == [*tokenizer.encode(text), tokenizer.eod_id] and shown["tokens"] == len(shown["ids"])
    assert show_document(folder / "bare", 0, None) == {
        "document": 0,
        "first_token": 0,
        "tokens": 3,
        "ids": [1, 2, 3],
        "text": None,
    }
    for number in (3, -1):
        with pytest.raises(UserError, match=f"there is no document {number}"):
            show_document(folder / "text", number, None)


def test_a_sample_is_the_one_a_run_reads(folder, tokenizer):
    stream = build_training_samples([(folder / "text", 1.0)], 8, seed=3)
    for number in (0, 1, stream.order.orders[0].samples_per_epoch * 2 + 1):
        shown = show_sample(folder / "text", number, 8, 3, tokenizer)
        assert shown["ids"] == stream.sample(number).tolist()
        assert shown["epoch"] == number // stream.order.orders[0].samples_per_epoch
        assert shown["text"] == tokenizer.decode(shown["ids"])
        dataset = stream.sources[0].dataset
        places = np.arange(shown["first_token"], shown["first_token"] + 9) % dataset.tokens.size
        assert dataset.tokens[places].tolist() == shown["ids"]
        assert shown["first_document"] == dataset.document_of_token(places[0])
        assert shown["last_document"] == dataset.document_of_token(places[-1])
    for number, length in ((-1, 8), (0, 0)):
        with pytest.raises(UserError, match=f"sample {number} of sequence length {length}"):
            show_sample(folder / "text", number, length, 3, None)


def test_the_tokenizer_is_found_and_must_be_the_right_one(folder, tmp_path):
    assert find_tokenizer(folder / "bare", None) is None
    assert find_tokenizer(folder / "text", folder / "tokenizer.json").fingerprint
    train_tokenizer(tmp_path / "tokenizer.json", ["other words altogether"])
    with pytest.raises(UserError, match="but the one given has"):
        find_tokenizer(folder / "text", tmp_path / "tokenizer.json")
    oracle.write(tmp_path / "moved", [[[1]]])
    oracle.make_manifest(tmp_path / "moved", file="gone.json")
    assert find_tokenizer(tmp_path / "moved", None) is None


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The tool as ``run_tool`` runs it, without a process of its own: (exit code, output, errors)."""

    def run(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def test_the_tool_prints_a_summary_and_text(folder):
    summary = run_tool(folder / "text", "--verify")
    assert (summary.returncode, summary.stderr) == (0, "")
    assert "documents       3 in 3 sequences" in summary.stdout and "checksums" in summary.stdout
    assert TEXTS[2] in run_tool(folder / "text", "--document", 2).stdout
    sample = run_tool(folder / "text", "--sample", 0, "--sequence-length", 4, "--seed", 1)
    assert sample.stdout.startswith("sample: 0\nepoch: 0\n") and sample.returncode == 0
    ids = run_tool(folder / "bare", "--document", 0).stdout
    assert "no tokenizer was found" in ids and ids.endswith("1 2 3\n")


def test_the_tool_prints_json(folder):
    printed = json.loads(run_tool(folder / "text", "--json", "--verify", "--document", 0).stdout)
    expected = summarise(folder / "text", verify=True)
    shown = printed.pop("shown")
    assert printed == expected
    assert shown["text"].startswith(TEXTS[0])
    assert json.loads(run_tool(folder / "bare", "--json").stdout)["shown"] is None


def test_the_tool_ends_with_one_message_and_code_2(folder, tmp_path, run_here):
    alone = run_tool(tmp_path / "missing")
    assert (alone.returncode, alone.stdout) == (2, "")
    assert "does not exist" in alone.stderr and "Traceback" not in alone.stderr
    for arguments, problem in (
        ([tmp_path / "missing", "--verify"], "does not exist"),
        ([folder / "text.bin"], "named without its suffix"),
        ([folder / "text", "--document", 9], "there is no document 9"),
        ([folder / "text", "--sample", 0, "--sequence-length", 10_000, "--seed", 0], "takes 10,001"),
        ([folder / "text", "--sample", 0], "needs --sequence-length and --seed"),
        ([folder / "text", "--seed", 0], "belongs to --sample"),
    ):
        code, output, errors = run_here(*arguments)
        assert (code, output) == (2, ""), arguments
        assert problem in errors and "Traceback" not in errors


def test_a_step_is_shown_as_a_run_reads_it(tmp_path, run_here):
    """Each sample of the step, from two sources, with the tokens that the loaders of any layout give."""
    from support import small_config, write_config, write_tokens

    first, second = write_tokens(tmp_path / "a", seed=1), write_tokens(tmp_path / "b", seed=2)
    config = small_config(tmp_path, data={"validation": {}})
    config["data"]["train"] = [{"path": str(first), "weight": 2.0}, {"path": str(second), "weight": 1.0}]
    path = write_config(tmp_path / "config.yaml", config)
    done = run_tool("--config", path, "--step", 4, "--json", "--set", "training.global_batch_size=6")
    assert (done.returncode, done.stderr) == (0, "")
    samples = json.loads(done.stdout)["samples"]
    assert [sample["position"] for sample in samples] == list(range(18, 24))
    assert {sample["source"] for sample in samples} == {str(first), str(second)}
    from megachiar.config import load_config
    from megachiar.data.sampling.loader import BatchLoader
    from megachiar.training.run_data import open_data

    stream = open_data(load_config(path)).training
    read = []
    for rank in range(3):
        with BatchLoader(stream, 1, 2, rank, 3, start_sample=18) as loader:
            read += [(18 + 3 * turn + rank, next(loader)[0].tolist()) for turn in range(2)]
    assert [sample["ids"] for sample in samples] == [ids for _, ids in sorted(read)]
    text = run_tool("--config", path, "--step", 1).stdout
    assert text.startswith("position: 0\nsource: ") and "documents: " in text
    assert run_here("--config", path)[0] == 2 and run_here(first, "--step", 1)[0] == 2
    assert "0 is no step" in run_here("--config", path, "--step", 0)[2]
    last = load_config(path).steps
    assert run_here("--config", path, "--step", last)[0] is None
    code, shown, message = run_here("--config", path, "--step", last + 1)
    assert code == 2 and not shown
    assert f"--step {last + 1}: the run ends with step {last}" in message and "training.steps" in message
    assert run_here("--config", path, "--step", last + 1, f"--training.steps={last + 1}")[0] is None
