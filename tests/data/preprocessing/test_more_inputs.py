"""Preprocessing of csv, arrays, Arrow and damaged files; tokens at the edges of documents and inside, bad bytes."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
import sentencepiece
import tokenizers
from pyarrow import ipc
from text_helpers import COMPRESS, DOCUMENTS, numbered_documents, run_tool, train, write_jsonl

from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.merge import merge_datasets
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shards import make_shard, merge_shards
from megachiar.data.preprocessing.split import Split
from megachiar.data.storage.manifest import read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.errors import UserError

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
CONTROL_TEXTS = [
    "<|endoftext|>",
    "a<|endoftext|>b",
    "one two<|endoftext|>\n<|endoftext|> three",
    "</s>x<s> </s>",
    "plain",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: train(folder, kind) for kind in ("sentencepiece", "huggingface")}


def settings(folder: Path, model: Path, inputs: list[Path], **changes: object) -> PreprocessSettings:
    folder.mkdir(exist_ok=True)
    values = {"read": ReadOptions(chunk_bytes=2000), **changes}
    return PreprocessSettings(find_sources(inputs), model, folder / "out", **values)


def run(settings: PreprocessSettings):
    return preprocess(settings, io.StringIO())


def ids_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset[number].tolist() for number in range(len(dataset))]


def library_ids(models: dict[str, Path], texts: list[str]) -> list[list[int]]:
    """The ids of plain texts as `tokenizers` gives them."""
    library = tokenizers.Tokenizer.from_file(str(models["huggingface"]))
    return [library.encode(text).ids for text in texts]


# --- formats ----------------------------------------------------------------------------------------------------------


def write_as(path: Path, texts: list[str]) -> Path:
    """Write texts in the format that the suffix names."""
    kind = "".join(path.suffixes[:1])
    if kind == ".arrow":
        with open(path, "wb") as file, ipc.new_stream(file, pyarrow.schema([("text", pyarrow.string())])) as writer:
            for first in range(0, len(texts), 5):
                writer.write_batch(pyarrow.record_batch({"text": texts[first : first + 5]}))
        return path
    if kind == ".csv":
        table = io.StringIO(newline="")
        csv.writer(table).writerows([["n", "text"], *enumerate(texts)])
        content = table.getvalue().encode()
    else:
        content = json.dumps([{"text": text} for text in texts], indent=1).encode()
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    return path


KINDS = [".json", ".json.xz", ".csv", ".csv.bz2", ".arrow"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 3])
def test_each_format_gives_the_tokens_of_json_lines(tmp_path, models, kind, workers):
    texts = numbered_documents(300)
    source = write_as(tmp_path / f"in{kind}", texts)
    report = run(settings(tmp_path / "made", models["huggingface"], [source], workers=workers, append_eod=True))
    assert ids_of(tmp_path / "made" / "out") == [[*ids, 0] for ids in library_ids(models, texts)]
    (record,) = report.source_records
    assert record[:2] == [str(source), source.stat().st_size]
    assert run(settings(tmp_path / "made", models["huggingface"], [source], append_eod=True)).existed
    write_as(source, [*texts[:-1], texts[-1][:-1] + "?"])
    with pytest.raises(UserError, match="was changed since"):
        run(settings(tmp_path / "made", models["huggingface"], [source], append_eod=True))


@pytest.mark.parametrize("kind", [".json.gz", ".json.xz", ".csv.bz2", ".csv.zst", ".csv.xz"])
def test_damaged_compressed_files_are_one_error_with_the_byte(tmp_path, models, kind):
    source = write_as(tmp_path / f"in{kind}", [os.urandom(40).hex() for _ in range(3000)])
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"is truncated: it ends after \d+ bytes|is damaged near byte \d+") as caught:
        run(settings(tmp_path / "made", models["huggingface"], [source]))
    assert caught.value.where == str(source) and caught.value.remedy
    if kind == ".csv.zst":  # the library writes no checksum, so that other text may come out of it
        return
    flipped = bytearray(whole)
    flipped[len(whole) * 2 // 3] ^= 0x55
    source.write_bytes(flipped)
    with pytest.raises(UserError, match=r"damaged near byte|truncated|\(byte \d+ of the decompressed text\)") as caught:
        run(settings(tmp_path / "made", models["huggingface"], [source]))
    assert caught.value.where.startswith(str(source))
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == []


SLOWED_TOOL = """
import runpy, sys, time
from megachiar.data.inputs import chunk_groups
from megachiar.data.preprocessing import journal
chunk_groups.GROUP_BYTES = 2000
journal.SECONDS_BETWEEN_CHECKPOINTS, journal.LARGEST_SHARE = 0, float("inf")
read = chunk_groups.read_chunks

def slowly(sources, *rest):
    time.sleep(0.05)
    yield from read(sources, *rest)

chunk_groups.read_chunks = slowly
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, models):
    """Files of every format, with bad bytes among them that are replaced; killed again and again."""
    inputs = []
    for number, kind in enumerate(KINDS * 3):
        inputs.append(write_as(tmp_path / f"in_{number:02d}{kind}", numbered_documents(20 + number)))
    bad = tmp_path / "in_99.jsonl"
    bad.write_bytes(b'{"text": "caf\xe9"}\n{"text": 7}\n{"text": "ok"}\n')
    changes = {"append_eod": True, "prepend_bos": True, "on_error": "replace"}
    read = ReadOptions(chunk_bytes=2000, replace_bad_bytes=True)
    first = [bad, *inputs]
    whole = run(settings(tmp_path / "whole", models["huggingface"], first, read=read, **changes))
    command = [sys.executable, "-c", SLOWED_TOOL, str(TOOL), "--input", *map(str, first)]
    command += ["--tokenizer", str(models["huggingface"]), "--output-prefix", str(tmp_path / "out"), "--workers", "2"]
    command += ["--append-eod", "--prepend-bos", "--on-error", "replace"]
    rng, kills = random.Random(0), 0
    for attempt in itertools.count():
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, errors = process.communicate(timeout=rng.uniform(3, 6) if attempt < 4 else 120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            time.sleep(0.1)
            continue
        assert process.returncode == 0, errors
        break
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out.{suffix}").read_bytes() == (tmp_path / "whole" / f"out.{suffix}").read_bytes(), kills
    made = read_manifest(tmp_path / "out")
    assert made.replaced == whole.log.replaced == 1 and made.skipped == {"not_a_string": 1}
    assert "documents in which bytes that are not UTF-8 were replaced: 1" in errors


# --- tokens at the edges of documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"split": Split.parse("train=3,valid=1")}, {"shuffle_seed": 5}])
@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_begin_with_the_token(tmp_path, models, changes, append_eod):
    texts = numbered_documents(80)
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    model = models["sentencepiece"]
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    end = [library.eos_id()] if append_eod else []
    expected = [[library.bos_id(), *library.encode(text), *end] for text in texts]
    asked = settings(tmp_path / "made", model, [source], prepend_bos=True, append_eod=append_eod, workers=2, **changes)
    report = run(asked)
    found = [ids for prefix in asked.prefixes for ids in ids_of(prefix)]
    assert sorted(found) == sorted(expected) and (changes or found == expected)
    assert all(read_manifest(prefix).tokenizer.bos_id == library.bos_id() for prefix in asked.prefixes)
    assert f"each document begins with '<s>' (id {library.bos_id()})" in list(report.lines())


def test_another_token_begins_documents_where_it_is_named(tmp_path, models):
    source = write_jsonl(tmp_path / "in.jsonl", ["a b", "c"])
    run(settings(tmp_path / "made", models["huggingface"], [source], prepend_bos=True, bos_token="Z"))
    library = tokenizers.Tokenizer.from_file(str(models["huggingface"]))
    assert {ids[0] for ids in ids_of(tmp_path / "made" / "out")} == {library.token_to_id("Z")}
    plain = settings(tmp_path / "made", models["huggingface"], [source])
    with pytest.raises(UserError, match="not as this command makes it"):
        run(plain)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bos_token": "a"}, "names a token that no document gets"),
        ({"prepend_bos": True, "bos_token": "<none>"}, "the beginning-of-document token '<none>'"),
        ({"prepend_bos": True, "read": ReadOptions(label_key="label")}, "does not go with --prepend-bos"),
    ],
)
def test_a_token_that_cannot_begin_documents_is_refused(tmp_path, models, changes, problem):
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(UserError, match=problem):
        run(settings(tmp_path / "made", models["huggingface"], [source], **changes))


def test_datasets_that_begin_differently_are_not_merged(tmp_path, models):
    source = write_jsonl(tmp_path / "in.jsonl", numbered_documents(5))
    run(settings(tmp_path / "a", models["huggingface"], [source], prepend_bos=True))
    run(settings(tmp_path / "b", models["huggingface"], [source]))
    with pytest.raises(UserError, match="documents begin with their text, but with id 0 in"):
        merge_datasets([tmp_path / "a" / "out", tmp_path / "b" / "out"], tmp_path / "c")


def test_shards_keep_the_token_and_the_count_of_replaced_documents(tmp_path, models):
    inputs = [write_jsonl(tmp_path / f"in{number}.jsonl", numbered_documents(9)) for number in range(3)]
    for path in inputs[:2]:
        path.write_bytes(path.read_bytes() + b'{"text": "caf\xe9"}\n')
    read = ReadOptions(replace_bad_bytes=True)
    changes = {"read": read, "prepend_bos": True, "append_eod": True, "on_error": "replace"}
    run(settings(tmp_path / "whole", models["huggingface"], inputs, **changes))
    parts = settings(tmp_path / "parts", models["huggingface"], inputs, **changes)
    for number in range(3):
        make_shard(parts, number, 3)
    report = merge_shards(parts, 3)
    assert report.log.replaced == 2
    assert (tmp_path / "parts" / "out.json").read_bytes().count(b'"replaced": 2') == 1
    for suffix in ("bin", "idx"):
        names = [tmp_path / folder / f"out.{suffix}" for folder in ("whole", "parts")]
        assert names[0].read_bytes() == names[1].read_bytes()


# --- control tokens in text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("workers", [1, 2])
def test_control_strings_become_tokens_where_that_is_allowed(tmp_path, models, engine, workers):
    texts = [*CONTROL_TEXTS, *DOCUMENTS, *numbered_documents(40)]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    model = models["huggingface"]
    asked = settings(tmp_path / "made", model, [source], allow_control_tokens=True, engine=engine, workers=workers)
    run(asked)
    assert ids_of(tmp_path / "made" / "out") == library_ids(models, texts)
    with pytest.raises(UserError, match="allow_control_tokens"):
        run(settings(tmp_path / "made", model, [source]))
    run(settings(tmp_path / "text", model, [source], engine=engine))
    assert not any(0 in ids for ids in ids_of(tmp_path / "text" / "out"))


def test_sentencepiece_encodes_the_stretches_between_control_strings(tmp_path, models):
    source = write_jsonl(tmp_path / "in.jsonl", CONTROL_TEXTS)
    run(settings(tmp_path / "made", models["sentencepiece"], [source], allow_control_tokens=True))
    library = sentencepiece.SentencePieceProcessor(model_file=str(models["sentencepiece"]))
    begin, end, encode = library.bos_id(), library.eos_id(), library.encode
    found = ids_of(tmp_path / "made" / "out")
    assert found[3] == [end, *encode("x"), begin, *encode(" "), end]
    assert [found[n] for n in (0, 1, 2, 4)] == [encode(CONTROL_TEXTS[n]) for n in (0, 1, 2, 4)]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_takes_nested_and_several_keys(tmp_path, models):
    lines = [{"meta": {"title": f"T{n}"}, "text": text} for n, text in enumerate(numbered_documents(20))]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--input", source, "--tokenizer", models["huggingface"], "--output-prefix", tmp_path / "out"]
    done = run_tool("preprocess_data", *arguments, "--text-key", "meta.title", "text", "--prepend-bos")
    assert done.returncode == 0, done.stderr
    wanted = [f"{line['meta']['title']}\n\n{line['text']}" for line in lines]
    assert ids_of(tmp_path / "out") == [[0, *ids] for ids in library_ids(models, wanted)]
    again = run_tool("preprocess_data", *arguments, "--text-key", "text", "--prepend-bos")
    assert again.returncode == 2 and "it was made with" in again.stderr and "Traceback" not in again.stderr
    shown = run_tool("inspect_dataset", tmp_path / "out")
    assert "begins with     0" in shown.stdout


def test_a_broken_array_is_one_error_of_the_command(tmp_path, models):
    (tmp_path / "in.json").write_bytes(b'[{"text": "a"},\n {"text": "b"')
    done = run_tool(
        *("preprocess_data", "--input", tmp_path / "in.json", "--tokenizer", models["huggingface"]),
        *("--output-prefix", tmp_path / "out", "--workers", 2),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{tmp_path}/in.json (byte 29): broken JSON array: it is cut off" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]
