"""``tools/preprocess_data.py`` as a user runs it: pipes, bad input, kills, Ctrl-C and a full disk."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from text_helpers import DOCUMENTS, ROOT, numbered_documents, run_tool, train, write_jsonl

from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.tokenizers.tokenizer import load_tokenizer

TEXTS = DOCUMENTS + numbered_documents(300)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"), "sentencepiece")


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("in."))


def assert_holds(prefix: Path, model: Path, texts: list[str]) -> None:
    """``prefix`` is a dataset of these texts and nothing else."""
    tokenizer, dataset = load_tokenizer(model), IndexedDataset(prefix)
    assert [dataset[number].tolist() for number in range(len(dataset))] == tokenizer.encode_batch(texts)


def test_files_to_dataset(tmp_path, model):
    write_jsonl(tmp_path / "in.a.jsonl", TEXTS[:100])
    write_jsonl(tmp_path / "in.b.jsonl.gz", TEXTS[100:])
    done = run_tool(
        "preprocess_data",
        *("--input", f"{tmp_path}/in.a.jsonl", f"{tmp_path}/in.b.*", "--tokenizer", model),
        *("--output-prefix", tmp_path / "sub" / "out", "--workers", 2),
    )
    assert done.returncode == 0, done.stderr
    assert_holds(tmp_path / "sub" / "out", model, TEXTS)
    assert "305 documents" in done.stderr and "tokens/byte" in done.stderr and "MB/s" in done.stderr
    assert done.stdout == ""


def test_standard_input_to_a_split_dataset(tmp_path, model):
    content = write_jsonl(tmp_path / "in.jsonl", TEXTS).read_bytes()
    done = run_tool(
        "preprocess_data",
        *("--input", "-", "--tokenizer", model, "--output-prefix", tmp_path / "out"),
        *("--append-eod", "--split", "train=9,valid=1", "--workers", 1),
        stdin=content,
    )
    assert done.returncode == 0, done.stderr
    train_part, valid_part = IndexedDataset(tmp_path / "out_train"), IndexedDataset(tmp_path / "out_valid")
    assert len(train_part) + len(valid_part) == len(TEXTS)
    assert train_part[0][-1] == load_tokenizer(model).eod_id


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b'{"text": "a"}\n{"text"\n', [], "standard input:2 (byte 21): broken JSON"),
        (b'{"text": "caf\xe9"}\n', [], "standard input:1 (byte 13): byte 0xe9 is not valid UTF-8"),
        (b'{"body": "a"}\n', [], "has no key 'text'; keys are body"),
        (b'{"text": ""}\n', [], "is empty"),
        (b"", [], "held no usable document"),
        (b"a", ["--split", "train"], "--split train: a weight is not a number"),
        (b"ab", ["--format", "jsonl.gz"], "standard input: is not gzip data, but plain text"),
        (b"a", ["--workers", "0"], "--workers: 0 is not at least 1"),
        (b"a", ["--tokenizer", "nowhere.model"], "nowhere.model: there is no such tokenizer"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, model, content, arguments, message):
    prefix = tmp_path / "out"
    done = run_tool(
        "preprocess_data",
        *("--input", "-", "--tokenizer", model, "--output-prefix", prefix, "--workers", "1", *arguments),
        stdin=content,
    )
    assert done.returncode == 2
    assert message in done.stderr and "remedy:" in done.stderr
    assert "Traceback" not in done.stderr
    assert written(tmp_path) == []


@contextlib.contextmanager
def waiting_run(folder: Path, model: Path, workers: int) -> Iterator[subprocess.Popen]:
    """A run in the middle of its work: it has read all of its standard input so far, and more may come."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", "-", "--tokenizer", str(model)]
    command += ["--output-prefix", str(folder / "out"), "--workers", str(workers)]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Tests that were started in the background (nohup, a job of CI) ignore SIGINT and would pass that on.
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes
    )
    line = write_jsonl(folder / "in.jsonl", ["one two three four " * 60]).read_bytes()
    try:
        process.stdin.write(line * 6000)  # 7 MB, many chunks
        process.stdin.flush()
        wait_until(lambda: (folder / "out.bin.tmp").exists() and (folder / "out.bin.tmp").stat().st_size > 0)
        assert process.poll() is None
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
        with contextlib.suppress(OSError):  # the pipe is broken, and what is left in its buffer cannot be written
            process.stdin.close()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def members(group: int) -> dict[int, int]:
    """Process -> parent of the living processes of a process group."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found[int(folder.name)] = int(parent)
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")


@needs_proc
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_leaves_nothing_that_looks_whole_and_can_be_repeated(tmp_path, model, workers):
    with waiting_run(tmp_path, model, workers) as process:
        os.kill(process.pid, signal.SIGKILL)  # the parent only: its workers must go by themselves
        process.wait(10)
        wait_until(lambda: not members(process.pid), 20)
    assert not {"out.bin", "out.idx", "out.json"} & set(written(tmp_path))
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    arguments = ("--input", tmp_path / "in.jsonl", "--tokenizer", model, "--output-prefix", tmp_path / "out")
    done = run_tool("preprocess_data", *arguments, "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert_holds(tmp_path / "out", model, TEXTS)
    assert written(tmp_path) == ["out.bin", "out.idx", "out.inputs", "out.json"]


@needs_proc
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_cleans_up(tmp_path, model, workers):
    with waiting_run(tmp_path, model, workers) as process:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to every process of the terminal
        _, error = process.communicate(timeout=20)
        assert process.returncode == 130
        wait_until(lambda: not members(process.pid), 20)
    assert b"interrupted" in error and b"Traceback" not in error
    assert written(tmp_path) == []


@needs_proc
def test_a_killed_worker_ends_the_run(tmp_path, model):
    with waiting_run(tmp_path, model, 2) as process:
        workers = [child for child, parent in members(process.pid).items() if parent == process.pid]
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: set(members(process.pid)) == {process.pid})  # a busy machine lets them live a moment longer
        _, error = process.communicate(b'{"text": "more"}\n', timeout=20)
        assert process.returncode == 2
    assert b"was killed by SIGKILL" in error and b"Traceback" not in error
    assert written(tmp_path) == []


@pytest.mark.parametrize(("documents", "limit"), [(100, 1000), (30_000, 100_000)], ids=["at the end", "while writing"])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path, model, documents, limit):
    """A limit on the size of files stands for the disk; 100 documents wait in the buffer until the end."""
    write_jsonl(tmp_path / "in.jsonl", numbered_documents(documents))
    arguments = ("--input", tmp_path / "in.jsonl", "--tokenizer", model, "--output-prefix", tmp_path / "out")
    done = run_tool(
        "preprocess_data",
        *(*arguments, "--workers", 2),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write: File too large" in done.stderr and "Traceback" not in done.stderr
    assert written(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_really_full_disk(tmp_path, model):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let root mount")
    try:
        write_jsonl(tmp_path / "in.jsonl", numbered_documents(3000))
        arguments = ("--input", tmp_path / "in.jsonl", "--tokenizer", model, "--output-prefix", disk / "out")
        done = run_tool("preprocess_data", *arguments, "--workers", 2)
        assert done.returncode == 2, done.stderr
        assert "cannot write: No space left on device" in done.stderr and "free some space" in done.stderr
        assert written(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, model):
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    arguments = ("--input", tmp_path / "in.jsonl", "--tokenizer", model, "--output-prefix", tmp_path / "in.jsonl" / "x")
    done = run_tool("preprocess_data", *arguments, "--workers", 1)
    assert done.returncode == 2
    assert "in.jsonl" in done.stderr and "Traceback" not in done.stderr


def test_help_tells_what_there_is():
    done = run_tool("preprocess_data", "--help")
    assert done.returncode == 0
    for option in ("--input", "--append-eod", "--split", "--workers", "--on-error", "--overwrite", "--txt-documents"):
        assert option in done.stdout
