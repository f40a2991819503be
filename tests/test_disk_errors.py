"""Whatever a disk refuses while text is read or tokens are written is one message: the file, the reason, the remedy."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from text_helpers import numbered_documents, run_tool, train, write_jsonl

from megachiar.cli.main import main
from megachiar.console import run
from megachiar.data.inputs import compression
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing import encoder
from megachiar.data.preprocessing.merge import merge_datasets
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shards import make_shard, merge_shards
from megachiar.data.preprocessing.tokenizer_training import TrainingSettings, train_tokenizer
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError, disk_error

REFUSALS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EACCES", "ESTALE", "ENXIO")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"), "sentencepiece")


@pytest.fixture(params=REFUSALS)
def refusal(request) -> OSError:
    code = getattr(errno, request.param)
    return OSError(code, os.strerror(code))


def settings(folder: Path, model: Path, **changes: object) -> PreprocessSettings:
    corpus = write_jsonl(folder / "in.jsonl", numbered_documents(200))
    return PreprocessSettings(find_sources([corpus]), model, folder / "out", **changes)


def check(error: UserError, where: str, refusal: OSError) -> None:
    """The message names file, reason and remedy."""
    assert where in error.where, error.where
    assert refusal.strerror in error.problem and error.problem.startswith("cannot ")
    assert error.remedy


def refuse(monkeypatch, target: object, name: str, refusal: OSError, when: str, call: int = 1) -> None:
    """Let ``target.name`` refuse its ``call``-th call whose first argument, a path or open file, ends with ``when``."""
    real, calls = getattr(target, name, getattr(builtins, name, None)), []

    def refusing(first, *arguments, **options):
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        if path.endswith(when):
            calls.append(path)
            if len(calls) >= call:
                raise OSError(refusal.errno, refusal.strerror, *([path] if isinstance(first, str | Path) else []))
        return real(first, *arguments, **options)

    monkeypatch.setattr(target, name, refusing, raising=False)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are found through /proc")


@needs_proc
@pytest.mark.parametrize("file", ["out.bin.tmp", "out.idx.tmp", "out.json.tmp", "out.journal"])
def test_syncing(tmp_path, model, monkeypatch, refusal, file):
    refuse(monkeypatch, os, "fsync", refusal, file)
    with pytest.raises(UserError) as caught:
        preprocess(settings(tmp_path, model), io.StringIO())
    check(caught.value, file, refusal)
    assert not (tmp_path / "out.idx").exists()


@needs_proc
def test_syncing_the_folder(tmp_path, model, monkeypatch, refusal):
    refuse(monkeypatch, os, "fsync", refusal, tmp_path.name)
    with pytest.raises(UserError) as caught:
        preprocess(settings(tmp_path, model), io.StringIO())
    check(caught.value, tmp_path.name, refusal)


@needs_proc
def test_a_file_system_that_cannot_sync_folders_is_no_trouble(tmp_path, model, monkeypatch):
    refuse(monkeypatch, os, "fsync", OSError(errno.EINVAL, "Invalid argument"), tmp_path.name)
    preprocess(settings(tmp_path, model), io.StringIO())
    assert (tmp_path / "out.idx").exists()


@pytest.mark.parametrize("file", ["out.bin.tmp", "out.json.tmp", "out.idx.tmp"])
def test_renaming(tmp_path, model, monkeypatch, refusal, file):
    wanted = settings(tmp_path, model)
    with monkeypatch.context() as patch:
        refuse(patch, os, "replace", refusal, file)
        with pytest.raises(UserError) as caught:
            preprocess(wanted, io.StringIO())
    check(caught.value, file, refusal)
    preprocess(wanted, io.StringIO())
    assert (tmp_path / "out.idx").exists(), "the next run does what was left"


@pytest.mark.parametrize("file", ["out.bin.tmp", "out.idx.tmp", "out.starts.tmp", "out.journal"])
def test_opening_what_is_written(tmp_path, model, monkeypatch, refusal, file):
    refuse(monkeypatch, os, "open", refusal, file)
    with pytest.raises(UserError) as caught:
        preprocess(settings(tmp_path, model), io.StringIO())
    check(caught.value, "out", refusal)


@pytest.mark.parametrize("call", [1, 2])  # for its size, and before it is read
def test_looking_at_an_input(tmp_path, model, monkeypatch, refusal, call):
    wanted = settings(tmp_path, model)
    refuse(monkeypatch, os, "stat", refusal, "in.jsonl", call)
    with pytest.raises(UserError) as caught:
        preprocess(wanted, io.StringIO())
    check(caught.value, "in.jsonl", refusal)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2"])
@pytest.mark.parametrize("workers", [1, 2])
def test_reading_an_input(tmp_path, model, monkeypatch, refusal, suffix, workers):
    class Failing(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(refusal.errno, refusal.strerror)

    source = find_sources([write_jsonl(tmp_path / f"in.jsonl{suffix}", numbered_documents(20))])
    monkeypatch.setattr(compression, "open_input", lambda path: Failing())
    with pytest.raises(UserError) as caught:
        preprocess(PreprocessSettings(source, model, tmp_path / "out", workers=workers, fork=True), io.StringIO())
    check(caught.value, f"in.jsonl{suffix}", refusal)
    with pytest.raises(UserError) as caught:
        train_tokenizer(TrainingSettings(source, tmp_path / "t.model", 400), io.StringIO())
    check(caught.value, f"in.jsonl{suffix}", refusal)


def test_in_a_worker_process(tmp_path, model, monkeypatch, refusal):
    def failing(self, group):
        raise OSError(refusal.errno, refusal.strerror, "/somewhere/cache")

    monkeypatch.setattr(encoder.ChunkEncoder, "__call__", failing)
    with pytest.raises(UserError) as caught:
        preprocess(settings(tmp_path, model, workers=2, fork=True), io.StringIO())
    check(caught.value, "/somewhere/cache", refusal)


def test_shards(tmp_path, model, monkeypatch, refusal):
    wanted = settings(tmp_path, model)
    make_shard(wanted, 0, 1, io.StringIO())
    with monkeypatch.context() as patch:
        refuse(patch, os, "replace", refusal, "out.bin.tmp")
        with pytest.raises(UserError) as caught:
            merge_shards(wanted, 1)
        check(caught.value, "out.bin.tmp", refusal)
    with monkeypatch.context() as patch:
        patch.setattr("megachiar.data.preprocessing.shards.shutil.rmtree", lambda path: (_ for _ in ()).throw(refusal))
        with pytest.raises(UserError) as caught:
            merge_shards(wanted, 1)
        check(caught.value, "out.shards", refusal)


def test_every_refusal_has_a_remedy_of_its_kind():
    full = disk_error("a", OSError(errno.ENOSPC, "No space left on device"))
    assert str(full) == (
        "a: cannot write: No space left on device\n    remedy: free some space there or write somewhere else"
    )
    failing = disk_error("a", OSError(errno.EIO, "Input/output error", "b"), "read")
    assert failing.where == "b" and "dmesg" in failing.remedy


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read from its beginning")
def test_a_file_that_really_cannot_be_read(tmp_path, model):
    """The memory of a process has no byte 0: reading it is a real Input/output error."""
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    (tmp_path / "b.txt").write_text("text")
    arguments = ("--tokenizer", model, "--output-prefix", tmp_path / "out", "--workers", 2)
    done = run_tool("preprocess_data", "--input", tmp_path, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {tmp_path}/a.txt: cannot read: Input/output error" in done.stderr and "remedy:" in done.stderr


def test_a_name_that_is_really_too_long(tmp_path, model):
    write_jsonl(tmp_path / "in.jsonl", ["a"])
    arguments = ("--tokenizer", model, "--output-prefix", tmp_path / ("x" * 250), "--workers", 1)
    done = run_tool("preprocess_data", "--input", tmp_path / "in.jsonl", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "File name too long" in done.stderr and "choose a shorter name" in done.stderr


LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["merge", "IN", "--output", LONG], errno.ENAMETOOLONG),
        (["merge", LONG, "--output", "out"], errno.ENAMETOOLONG),
        (["evaluate", LONG], errno.ENAMETOOLONG),
        (["generate", LONG, "--prompt", "a"], errno.ENAMETOOLONG),
        (["corpus", "--output", LONG], errno.ENAMETOOLONG),
        (["corpus", "--output", "/dev/null/x"], errno.ENOTDIR),
        (["preprocess", "--input", "in.jsonl", "--tokenizer", "MODEL", "--output-prefix", "/proc/x"], errno.ENOENT),
        (["merge", "IN", "--output", "/proc/x"], errno.ENOENT),
    ],
)
def test_a_path_that_no_file_can_have_is_one_message(tmp_path, model, monkeypatch, capsys, arguments, code):
    monkeypatch.chdir(tmp_path)
    with IndexedDatasetBuilder("in", np.uint16) as builder:
        builder.add_document([1, 2])
    write_jsonl(tmp_path / "in.jsonl", ["a"])
    names = {"MODEL": str(model), "IN": "in"}
    options = ["--allow-missing-manifest"] if arguments[0] == "merge" else []
    with pytest.raises(SystemExit) as ended:
        run(lambda: main([*(names.get(word, word) for word in arguments), *options]))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and os.strerror(code) in message and message.count("remedy:") == 1, message
    assert "Traceback" not in message


@pytest.mark.parametrize("prefix", [".", "..", "a/.."])
def test_a_folder_as_the_name_of_a_dataset_is_refused(tmp_path, model, monkeypatch, prefix):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    changes = {"output_prefix": Path(prefix)}
    for make in (preprocess, lambda wanted: make_shard(wanted, 0, 1), lambda wanted: merge_shards(wanted, 1)):
        with pytest.raises(UserError, match="names a folder, not a dataset"):
            make(dataclasses.replace(settings(tmp_path, model), **changes))
    with pytest.raises(UserError, match="names a folder, not a dataset"):
        merge_datasets([tmp_path / "in"], prefix)
