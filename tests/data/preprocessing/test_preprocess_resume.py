"""Preprocessing that is killed, shared, shuffled: the bytes are those of one undisturbed process."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import find_mpirun
from text_helpers import train, write_other_text

from megachiar.data.inputs import chunk_groups, compression
from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.permutation import permute, round_keys
from megachiar.data.preprocessing import journal, shuffle
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shards import make_shard, merge_shards
from megachiar.data.preprocessing.shuffle import shuffle_documents
from megachiar.data.preprocessing.split import Split
from megachiar.data.storage import files, writer
from megachiar.data.storage.manifest import read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
FILES = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"), "sentencepiece")


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """Files of unequal size, one of them without a document."""
    rng = random.Random(3)
    paths = []
    for number in range(FILES):
        texts = ["one two three four five " * rng.randint(1, 30) + str(rng.random()) for _ in range(rng.randint(5, 60))]
        path = tmp_path / f"in_{number:02d}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if number != 4))
        paths.append(path)
    return paths


def settings(folder: Path, model: Path, corpus: list[Path], **changes: object) -> PreprocessSettings:
    values = {
        "sources": find_sources(corpus),
        "tokenizer": model,
        "output_prefix": folder / "out",
        "append_eod": True,
        "split": Split.parse("train=3,valid=1"),
    }
    folder.mkdir(exist_ok=True)
    return PreprocessSettings(**{**values, **changes})


def run(settings: PreprocessSettings) -> None:
    with open(os.devnull, "w") as quiet:
        preprocess(settings, quiet)


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder; the note on the inputs has their times, which are no part of what is compared."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".inputs"}


@pytest.fixture
def undisturbed(tmp_path, model, corpus) -> dict[str, bytes]:
    run(settings(tmp_path / "whole", model, corpus))
    return contents(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ the journal


# A file is read slowly enough that kills fall everywhere, and each is a checkpoint; what is read first is told.
SLOWED_TOOL = """
import runpy, sys, time
from megachiar.data.inputs import chunk_groups
from megachiar.data.preprocessing import journal
chunk_groups.GROUP_BYTES = HANDED_OVER
journal.SECONDS_BETWEEN_CHECKPOINTS = 0
journal.LARGEST_SHARE = float("inf")
read = chunk_groups.read_chunks

def slowly(sources, *rest):
    print(sources[0].name, flush=True)
    time.sleep(0.02)
    yield from read(sources, *rest)

chunk_groups.read_chunks = slowly
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("workers", "shuffle_seed"),
    [(1, None), (2, 7), pytest.param(1, 7, marks=pytest.mark.slow), pytest.param(2, None, marks=pytest.mark.slow)],
)
def test_killed_twenty_times_the_bytes_are_those_of_an_undisturbed_run(tmp_path, model, corpus, workers, shuffle_seed):
    """Real kills of the real tool at random moments; every run is the same command.

    Moments are counted from the first file that a run reads, or a busy machine would spend them all on imports; one in
    five falls before it.
    """
    run(settings(tmp_path / "whole", model, corpus, shuffle_seed=shuffle_seed))
    folder = tmp_path / "killed"
    group_bytes = 30_000 if workers == 1 else 0  # several files together, or each by itself
    program = SLOWED_TOOL.replace("HANDED_OVER", str(group_bytes))
    command = [sys.executable, "-c", program, str(TOOL), "--input", *map(str, corpus), "--tokenizer", str(model)]
    command += ["--output-prefix", str(folder / "out"), "--split", "train=3,valid=1", "--workers", str(workers)]
    command += ["--append-eod"] + (["--shuffle-seed", str(shuffle_seed)] if shuffle_seed is not None else [])

    def begin() -> tuple[subprocess.Popen, float]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, start_new_session=True, **pipes), time.monotonic()

    def end(process: subprocess.Popen) -> None:
        """Wait for its end, which must be a good one or a kill."""
        error = process.communicate(timeout=120)[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error

    def is_whole() -> bool:
        """Whether nothing is left to do; a kill may also come after the last of it."""
        return (folder / "out_valid.idx").exists() and not (folder / "out.journal").exists()

    process, began = begin()
    assert process.stdout.readline()
    start_up, reading = time.monotonic() - began, time.monotonic()
    end(process)
    work, pause = time.monotonic() - reading, random.Random(workers)
    went_on = 0
    for kill in range(20):
        if is_whole():  # it came to its end between the kills: compare, and disturb another run
            assert contents(folder) == contents(tmp_path / "whole")
            shutil.rmtree(folder)
        process, _ = begin()
        if kill % 5 == 4:
            time.sleep(start_up * pause.random())
        else:
            first = process.stdout.readline().decode().strip()  # empty: all was read before
            went_on += first != str(corpus[0])
            time.sleep(work * pause.uniform(0, 0.6))
        with contextlib.suppress(ProcessLookupError):  # it has come to its end
            os.killpg(process.pid, signal.SIGKILL)
        end(process)
    if not is_whole():
        end(begin()[0])
    assert contents(folder) == contents(tmp_path / "whole")
    assert went_on >= 5


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_at_file(monkeypatch, number: int) -> None:
    """Let the next run fail when it comes to the input of this number; what is read is handed over file by file."""
    read = chunk_groups.read_chunks

    def failing(sources, *rest):
        if sources[0].path.name == f"in_{number:02d}.jsonl":
            raise Stop
        return read(sources, *rest)

    monkeypatch.setattr(chunk_groups, "read_chunks", failing)
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", 0)
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(journal, "LARGEST_SHARE", math.inf)  # whatever a checkpoint costs


def stop_after_renames(monkeypatch, number: int) -> None:
    """Let whatever puts files in their places fail after ``number`` of them."""
    real, placed = os.replace, []

    def stop(source: Path, target: Path) -> None:
        if len(placed) == number:
            raise Stop
        placed.append(target)
        real(source, target)

    monkeypatch.setattr(files.os, "replace", stop)


def test_only_what_is_missing_is_read_again(tmp_path, model, corpus, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_file(patch, 8)
        with pytest.raises(Stop):
            run(settings(tmp_path / "again", model, corpus))
    kept = contents(tmp_path / "again")
    assert "out.journal" in kept and not any(name.endswith((".bin", ".idx", ".json")) for name in kept)
    read, real = [], chunk_groups.read_chunks
    monkeypatch.setattr(chunk_groups, "read_chunks", lambda s, *rest: read.append(s[0].path.name) or real(s, *rest))
    run(settings(tmp_path / "again", model, corpus))
    assert read[0] >= "in_06.jsonl" and read[-1] == "in_11.jsonl"
    assert contents(tmp_path / "again") == undisturbed


def test_files_that_were_mended_or_added_later_are_read(tmp_path, model, corpus, monkeypatch):
    """A broken line in a late file: what was done before it is kept, and the mended file is read."""
    whole = corpus[9].read_text()
    corpus[9].write_text(whole + '{"text": broken\n')
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", 0)
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(journal, "LARGEST_SHARE", math.inf)  # whatever a checkpoint costs
    with pytest.raises(UserError, match=r"in_09\.jsonl.*broken JSON"):
        run(settings(tmp_path / "again", model, corpus))
    assert (tmp_path / "again" / "out.journal").exists()
    corpus[9].write_text(whole)
    run(settings(tmp_path / "again", model, corpus))
    run(settings(tmp_path / "whole", model, corpus))
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize("group_bytes", [0, 5_000])
def test_no_document_is_doubled_or_lost_wherever_checkpoints_fall(tmp_path, model, corpus, monkeypatch, group_bytes):
    """Also in the middle of a file, and between files that were handed over together; files have several chunks."""
    monkeypatch.setattr(compression, "READ_BYTES", 500)
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", group_bytes)
    changes = {"read": ReadOptions(chunk_bytes=500), "append_eod": True}
    run(settings(tmp_path / "whole", model, corpus, **changes))
    whole = corpus[11].read_text()
    for wanted in (1, 2, 3, 5, 8, 13):
        calls = itertools.count(1)
        corpus[11].write_text(whole + "{broken\n")
        with monkeypatch.context() as patch:
            patch.setattr(journal.Journal, "due", lambda _, calls=calls, wanted=wanted: next(calls) == wanted)
            with pytest.raises(UserError, match="broken JSON"):
                run(settings(tmp_path / "again", model, corpus, **changes))
        corpus[11].write_text(whole)
        run(settings(tmp_path / "again", model, corpus, **changes))
        assert contents(tmp_path / "again") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "again")


def test_a_journal_of_the_version_before_is_gone_on_with(tmp_path, model, corpus, undisturbed, monkeypatch):
    """It knew nothing of unknown tokens, seals, and checksums of what is not a full block."""
    with monkeypatch.context() as patch:
        stop_at_file(patch, 8)
        with pytest.raises(Stop):
            run(settings(tmp_path / "again", model, corpus))
    path = tmp_path / "again" / "out.journal"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["seal"]
        for output in line.get("outputs", []):
            assert output.pop("unknown_tokens") == 0
            del output["unfinished_block"], output["lengths_checksum"], output["starts_checksum"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open(os.devnull, "w") as quiet:
        report = preprocess(settings(tmp_path / "again", model, corpus), quiet)
    assert contents(tmp_path / "again") == undisturbed
    assert "uncounted (an earlier version began this run) <unk> (id 0)" in "\n".join(report.lines())


@pytest.mark.parametrize("what", ["changed", "reordered", "options", "tokenizer", "temporary file"])
def test_an_unfinished_run_of_something_else_is_not_gone_on_with(
    tmp_path, model, corpus, undisturbed, monkeypatch, what
):
    folder = tmp_path / "again"
    with monkeypatch.context() as patch:
        stop_at_file(patch, 8)
        with pytest.raises(Stop):
            run(settings(folder, model, corpus))
    kept = contents(folder)
    wanted = settings(folder, model, corpus)
    if what == "changed":
        write_other_text(corpus[2])
        problem = r"in_02\.jsonl was changed since"
    elif what == "reordered":
        wanted = settings(folder, model, [corpus[1], corpus[0], *corpus[2:]])
        problem = r"has read .*in_00\.jsonl as input 1, but input 1 is .*in_01"
    elif what == "options":
        wanted = settings(folder, model, corpus, split=Split.parse("train=2,valid=1"))
        problem = "with split 'train=3,valid=1', but this one has 'train=2,valid=1'"
    elif what == "tokenizer":
        (tmp_path / "other").mkdir()
        other = train(tmp_path / "other", "sentencepiece", vocab_size=380)
        wanted = settings(folder, other, corpus)
        problem = "with tokenizer 'sha256:"
    else:
        os.truncate(folder / "out_train.bin.tmp", 10)
        kept["out_train.bin.tmp"] = kept["out_train.bin.tmp"][:10]
        problem = r"out_train\.bin\.tmp: has 10 bytes, but the journal beside it tells of"
    with pytest.raises(UserError, match=problem) as refused:
        run(wanted)
    assert "--restart" in refused.value.remedy
    assert contents(folder) == kept
    run(settings(folder, model, corpus, restart=True))
    assert contents(folder).keys() == undisturbed.keys()


def test_a_journal_cut_short_by_a_power_cut_counts_up_to_its_last_whole_line(
    tmp_path, model, corpus, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at_file(patch, 8)
        with pytest.raises(Stop):
            run(settings(tmp_path / "again", model, corpus))
    path = tmp_path / "again" / "out.journal"
    path.write_bytes(path.read_bytes()[:-20])
    run(settings(tmp_path / "again", model, corpus))
    assert contents(tmp_path / "again") == undisturbed


def test_a_run_killed_between_its_last_renames_is_completed(tmp_path, model, corpus, undisturbed, monkeypatch):
    """The first part is in its place when the run ends: the next one must neither refuse it nor begin again."""
    folder = tmp_path / "again"
    with monkeypatch.context() as patch:
        stop_after_renames(patch, 4)
        with pytest.raises(Stop):
            run(settings(folder, model, corpus))
    assert (folder / "out_train.idx").exists() and not (folder / "out_valid.idx").exists()
    run(settings(folder, model, corpus))
    assert contents(folder) == undisturbed


def test_two_runs_of_one_output_do_not_meet(tmp_path, model, corpus):
    held = journal.Journal.open(tmp_path / "out.journal", {})
    with pytest.raises(UserError, match=r"out\.journal: another process is writing this dataset"):
        run(settings(tmp_path, model, corpus))
    held.remove()


def test_a_builder_goes_on_from_its_state_in_the_middle_of_a_checksum_block(tmp_path, monkeypatch):
    for module in (files, writer):
        monkeypatch.setattr(module, "CHECKSUM_BLOCK", 1000)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60_000, size) for size in rng.integers(1, 400, 50)]
    with IndexedDatasetBuilder(tmp_path / "whole", "uint16") as whole:
        for document in documents:
            whole.add_document(document)
    builder = IndexedDatasetBuilder(tmp_path / "again", "uint16")
    for first in range(0, 50, 7):
        for document in documents[first : first + 7]:
            builder.add_document(document)
        state = builder.state()
        builder.add_document([1, 2, 3])  # written after the last checkpoint, and lost with the process
        builder.close()
        builder = IndexedDatasetBuilder(tmp_path / "again", "uint16", state)
    builder.finish()
    assert builder.checksums == whole.checksums and len(whole.checksums.bin) > 5
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"again.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


# ------------------------------------------------------------------------------------------------ shards and MPI


@pytest.mark.parametrize("shuffle_seed", [None, 7])
def test_shards_made_apart_and_merged_are_what_one_process_makes(tmp_path, model, corpus, shuffle_seed):
    run(settings(tmp_path / "whole", model, corpus, shuffle_seed=shuffle_seed))
    wanted = settings(tmp_path / "merged", model, corpus, shuffle_seed=shuffle_seed)
    with open(os.devnull, "w") as quiet:
        for number in (2, 0, 4, 1, 3):
            make_shard(wanted, number, 5, quiet)
    merge_shards(wanted, 5)
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def test_the_report_of_a_merge_is_that_of_one_run(tmp_path, model, corpus):
    with open(os.devnull, "w") as quiet:
        whole = preprocess(settings(tmp_path / "whole", model, corpus), quiet)
        wanted = settings(tmp_path / "merged", model, corpus)
        for number in range(3):
            make_shard(wanted, number, 3, quiet)
    merged = merge_shards(wanted, 3)
    assert merged.document_end == whole.document_end and merged.unknown_id == whole.unknown_id == 0
    assert list(merged.unknown_tokens.values()) == list(whole.unknown_tokens.values()) == [0, 0]


def test_a_shard_without_documents_of_a_part_is_no_trouble(tmp_path, model, corpus, undisturbed):
    """One file a shard: the empty one has no document at all, small ones may lack the smaller part."""
    wanted = settings(tmp_path / "merged", model, corpus)
    with open(os.devnull, "w") as quiet:
        for number in range(FILES):
            make_shard(wanted, number, FILES, quiet)
    merge_shards(wanted, FILES)
    assert contents(tmp_path / "merged") == undisturbed


def test_a_merge_names_the_shard_that_is_missing_or_of_other_inputs(tmp_path, model, corpus):
    wanted = settings(tmp_path / "merged", model, corpus)
    with open(os.devnull, "w") as quiet:
        make_shard(wanted, 0, 2, quiet)
        with pytest.raises(UserError, match="shard 1 of 2 was not made"):
            merge_shards(wanted, 2)
        make_shard(wanted, 1, 2, quiet)
    write_other_text(corpus[-1])
    with pytest.raises(UserError, match="shard 1 of 2 was made by another call, or its inputs were changed since"):
        merge_shards(wanted, 2)


def test_a_merge_killed_between_its_last_renames_is_completed(tmp_path, model, corpus, undisturbed, monkeypatch):
    wanted = settings(tmp_path / "merged", model, corpus)
    with open(os.devnull, "w") as quiet:
        for number in range(2):
            make_shard(wanted, number, 2, quiet)
    with monkeypatch.context() as patch:
        stop_after_renames(patch, 4)
        with pytest.raises(Stop):
            merge_shards(wanted, 2)
    assert (tmp_path / "merged" / "out_train.idx").exists()
    assert make_shard(wanted, 1, 2) is None
    merge_shards(wanted, 2)
    assert contents(tmp_path / "merged") == undisturbed


@pytest.mark.parametrize("fails", [False, True])
def test_three_mpi_ranks_write_what_one_process_writes(tmp_path, model, corpus, undisturbed, fails):
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("mpi4py and mpirun are not installed (extra: mpi)")
    whole = corpus[9].read_text()
    if fails:
        corpus[9].write_text(whole + "{broken\n")
    command = [mpirun, "-n", "3", sys.executable, str(TOOL), "--mpi", "--input", *map(str, corpus), "--append-eod"]
    command += ["--tokenizer", str(model), "--output-prefix", str(tmp_path / "mpi" / "out"), "--workers", "1"]
    command += ["--split", "train=3,valid=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if fails:
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert done.stderr.count("broken JSON") == 1, done.stderr
        corpus[9].write_text(whole)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "mpi") == undisturbed
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "exists already and is what this command makes" in again.stderr, again.stderr
    assert contents(tmp_path / "mpi") == undisturbed


def test_a_damaged_shard_is_not_merged(tmp_path, model, corpus):
    wanted = settings(tmp_path / "merged", model, corpus)
    with open(os.devnull, "w") as quiet:
        for number in range(2):
            make_shard(wanted, number, 2, quiet)
    victim = tmp_path / "merged" / "out.shards" / "00001-of-00002_train.bin"
    content = bytearray(victim.read_bytes())
    content[6] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match=r"00001-of-00002_train\.bin: bytes 0 to .* but its manifest records"):
        merge_shards(wanted, 2)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["out.shards"]


def test_more_shards_than_inputs_are_refused(tmp_path, model, corpus):
    with pytest.raises(UserError, match="13 shards of 12 inputs"):
        make_shard(settings(tmp_path, model, corpus), 0, 13)
    with pytest.raises(UserError, match="0 shards"):
        merge_shards(settings(tmp_path, model, corpus), 0)
    with pytest.raises(UserError, match="shard 3 of 3"):
        make_shard(settings(tmp_path, model, corpus), 3, 3)


# ------------------------------------------------------------------------------------------------ shuffling


@pytest.mark.parametrize("bucket_bytes", [64, 1 << 20])
def test_a_shuffle_moves_every_document_to_its_permuted_place(tmp_path, monkeypatch, bucket_bytes):
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 100)
    monkeypatch.setattr(shuffle, "BLOCK_DOCUMENTS", 7)
    rng = np.random.default_rng(1)
    documents = [[rng.integers(0, 99, n).tolist() for n in rng.integers(0, 6, rng.integers(1, 4))] for _ in range(60)]
    documents[5] = [[1]]
    with IndexedDatasetBuilder(tmp_path / "a", "uint16") as builder:
        for document in documents:
            flat, lengths = list(itertools.chain(*document)), [len(sequence) for sequence in document]
            builder.add_sequences(np.array(flat, np.int64), lengths, [builder.sequences + len(lengths)])
    with IndexedDatasetBuilder(tmp_path / "b", "uint16") as builder:
        shuffle_documents(IndexedDataset(tmp_path / "a"), builder, 5)
    places = permute(np.arange(60), 60, round_keys("documents", 5))
    expected = [documents[old] for old in np.argsort(places)]
    shuffled = IndexedDataset(tmp_path / "b")
    starts = shuffled.document_starts
    found = [[shuffled[s].tolist() for s in range(starts[d], starts[d + 1])] for d in range(60)]
    assert found == expected and found != documents


def test_the_seed_decides_the_order_and_is_recorded(tmp_path, model, corpus):
    orders = {}
    for seed in (1, 2):
        run(settings(tmp_path / str(seed), model, corpus, shuffle_seed=seed, split=None))
        assert read_manifest(tmp_path / str(seed) / "out").shuffle_seed == seed
        dataset = IndexedDataset(tmp_path / str(seed) / "out")
        orders[seed] = [dataset.document(number).tobytes() for number in range(dataset.documents)]
    assert orders[1] != orders[2] and sorted(orders[1]) == sorted(orders[2])
