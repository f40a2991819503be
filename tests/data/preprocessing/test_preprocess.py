"""Preprocessing: the bytes are right and the same with any number of workers and from any format."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import sentencepiece
import tokenizers
from pyarrow import parquet
from text_helpers import DOCUMENTS, expected_index, numbered_documents, train, write_jsonl

from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.encoder import ChunkEncoder, narrow
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.split import Split
from megachiar.data.storage.manifest import check_manifest, read_manifest
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python

TEXTS = DOCUMENTS + numbered_documents(300)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"), "sentencepiece")


def prepare(folder: Path, model: Path, texts: list[str] | None = None, **changes) -> PreprocessSettings:
    """Settings for ``texts`` in a file ``in.jsonl`` of ``folder``, in small chunks."""
    corpus = write_jsonl(folder / "in.jsonl", TEXTS if texts is None else texts)
    settings = PreprocessSettings(
        find_sources([corpus]), model, folder / "out", read=ReadOptions(chunk_bytes=2000), append_eod=True
    )
    return dataclasses.replace(settings, **changes)


def run_quietly(settings: PreprocessSettings):
    return preprocess(settings, io.StringIO())


def written(folder: Path) -> list[str]:
    """Everything in ``folder`` but the input."""
    return sorted(path.name for path in folder.iterdir() if path.name != "in.jsonl")


def documents_of(prefix: Path) -> list[list[int]]:
    """Token ids of each document, read from the format's description alone."""
    index, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    code, count = struct.unpack_from("<BQ", index, 17)
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    flat = struct.unpack(f"<{sum(lengths)}{ {8: 'H', 4: 'i'}[code] }", tokens)
    ends = np.cumsum(lengths)
    return [list(flat[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_bytes_are_megatrons_with_any_number_of_workers(tmp_path, model, workers):
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = [[*library.encode(text), library.eos_id()] for text in TEXTS]
    run_quietly(prepare(tmp_path, model, workers=workers))
    flat = [index for document in ids for index in document]
    assert (tmp_path / "out.bin").read_bytes() == struct.pack(f"<{len(flat)}H", *flat)
    assert (tmp_path / "out.idx").read_bytes() == expected_index([len(document) for document in ids], 8, 2)
    assert written(tmp_path) == ["out.bin", "out.idx", "out.inputs", "out.json"]


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    vocabulary = {f"w{number}": number for number in range(70_000)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    settings = prepare(tmp_path, tmp_path / "tokenizer.json", ["w69999 w1", "w65536"], append_eod=False)
    run_quietly(settings)
    assert (tmp_path / "out.bin").read_bytes() == struct.pack("<3i", 69_999, 1, 65_536)
    assert (tmp_path / "out.idx").read_bytes() == expected_index([2, 1], 4, 4)
    assert read_manifest(tmp_path / "out").dtype == "int32"


def test_an_id_that_does_not_fit_is_refused_not_wrapped():
    fits = narrow(np.array([0, 65_535]), np.dtype("<u2"), Path("t.model"))
    assert fits.dtype == np.dtype("<u2") and fits.tolist() == [0, 65_535]
    for wrong in (70_000, -1):
        with pytest.raises(UserError, match=rf"t\.model: gave token id {wrong}"):
            narrow(np.array([5, wrong]), np.dtype("<u2"), Path("t.model"))


def test_every_format_gives_the_same_tokens(tmp_path, model):
    # A text of a line-by-line file cannot hold a line end, nor one between blank lines a blank line.
    texts = numbered_documents(50)
    made = {}
    table = pyarrow.table({"text": texts})
    for name, options in {
        "jsonl": {},
        "jsonl.gz": {},
        "jsonl.zst": {},
        "parquet": {},
        "line.txt": {"txt_documents": "line"},
        "paragraph.txt": {"txt_documents": "blank-line"},
        "files": {},
    }.items():
        source = tmp_path / f"in.{name}"
        if name.startswith("jsonl"):
            write_jsonl(source, texts)
        elif name == "parquet":
            parquet.write_table(table, source, row_group_size=13)
        elif name.endswith("txt"):
            source.write_text(("\n" if name.startswith("line") else "\n\n").join(texts))
        else:
            source.mkdir()
            for number, text in enumerate(texts):
                (source / f"{number:03}.txt").write_text(text)
        prefix = tmp_path / f"out-{name}"
        run_quietly(PreprocessSettings(find_sources([source]), model, prefix, read=ReadOptions(**options)))
        made[name] = Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
    assert len(made) == 7 and len(set(made.values())) == 1
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert documents_of(tmp_path / "out-jsonl") == [library.encode(text) for text in texts]


def test_only_the_end_of_a_document_holds_its_token(tmp_path, model):
    run_quietly(prepare(tmp_path, model, ["one </s> two <s>", "</s>"]))
    eod = load_tokenizer(model).eod_id
    for document in documents_of(tmp_path / "out"):
        assert document.index(eod) == len(document) - 1


def test_without_append_eod_there_is_none(tmp_path, model):
    run_quietly(prepare(tmp_path, model, append_eod=False))
    assert all(load_tokenizer(model).eod_id not in document for document in documents_of(tmp_path / "out"))
    assert read_manifest(tmp_path / "out").append_eod is False


def test_the_manifest_counts_what_was_written(tmp_path, model):
    report = run_quietly(prepare(tmp_path, model))
    manifest = read_manifest(tmp_path / "out")
    check_manifest(tmp_path / "out", manifest, verify=True)
    documents = documents_of(tmp_path / "out")
    assert report.manifests == {tmp_path / "out": manifest}
    assert manifest.documents == len(TEXTS)
    assert manifest.tokens == sum(map(len, documents))
    assert manifest.largest_token_id == max(map(max, documents))
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.words == sum(len(text.split()) for text in TEXTS)
    assert manifest.sources == [str(tmp_path / "in.jsonl")]
    assert manifest.skipped == {}
    tokenizer = load_tokenizer(model)
    assert manifest.tokenizer.fingerprint == tokenizer.fingerprint
    assert (manifest.tokenizer.eod_id, manifest.tokenizer.vocab_size) == (tokenizer.eod_id, 400)
    assert Path(manifest.tokenizer.file) == model.resolve()
    assert f"{len(TEXTS):,} documents, {manifest.tokens:,} tokens (uint16)" in "\n".join(report.lines())


def test_a_tokenizer_beside_the_dataset_is_recorded_relative_to_it(tmp_path, model):
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    run_quietly(prepare(tmp_path, tmp_path / "tokenizer.model"))
    assert read_manifest(tmp_path / "out").tokenizer.file == "tokenizer.model"


def test_the_manifest_is_json_that_people_can_read(tmp_path, model):
    run_quietly(prepare(tmp_path, model))
    assert json.loads((tmp_path / "out.json").read_text())["documents"] == len(TEXTS)


# --- split ------------------------------------------------------------------------------------------------------------


def test_a_split_is_exhaustive_and_keeps_the_order(tmp_path, model):
    split = Split.parse("train=8,valid=1,test=1")
    run_quietly(prepare(tmp_path, model, split=split, workers=2))
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected: dict[str, list[list[int]]] = {name: [] for name in split.names}
    for text in TEXTS:
        share = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
        name = "train" if share < 0.8 else "valid" if share < 0.9 else "test"
        expected[name].append([*library.encode(text), library.eos_id()])
    assert all(expected.values())
    for name, documents in expected.items():
        assert documents_of(tmp_path / f"out_{name}") == documents
        assert read_manifest(tmp_path / f"out_{name}").documents == len(documents)
    assert not (tmp_path / "out.bin").exists()


def test_a_document_stays_in_its_part_when_the_corpus_changes(tmp_path, model):
    split = Split.parse("a=1,b=1")
    parts = {}
    for number, texts in enumerate((TEXTS, TEXTS[::-1], TEXTS[100:] * 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        run_quietly(prepare(folder, model, texts, split=split))
        parts[number] = [{tuple(ids) for ids in documents_of(folder / f"out_{name}")} for name in "ab"]
        assert parts[number][0].isdisjoint(parts[number][1])
    assert parts[0] == parts[1]
    assert parts[2][0] <= parts[0][0] and parts[2][1] <= parts[0][1]


def test_parts_have_the_sizes_asked_for():
    split = Split.parse("train=98, valid=1.5, test=0.5")
    counts = np.bincount([split.part_of(str(number).encode()) for number in range(100_000)], minlength=3)
    np.testing.assert_allclose(counts / 100_000, [0.98, 0.015, 0.005], atol=0.002)
    assert split.bounds[-1] == 2**64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", "a weight is not a number"),
        ("train=x", "a weight is not a number"),
        ("train=1/0", "a weight is not a number"),
        ("train=1,,test=1", "a weight is not a number"),
        ("", "a weight is not a number"),
        ("train=nan", "a weight is not a number"),
        ("train=0,test=1", "weights must be above 0"),
        ("train=-1,test=2", "weights must be above 0"),
        ("a=1,a=1", "a name occurs twice"),
        ("../a=1", "a name may hold letters"),
        ("=1", "a name may hold letters"),
    ],
)
def test_a_split_that_is_none_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        Split.parse(text)


def test_a_part_without_documents_is_refused(tmp_path, model):
    with pytest.raises(UserError, match="out_b: this part of the split got none of the 305 documents"):
        run_quietly(prepare(tmp_path, model, split=Split.parse("a=1000000,b=0.01")))
    assert written(tmp_path) == []


# --- what a user can mend ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_invalid_document_in_the_order_of_the_input_ends_the_run(tmp_path, model, workers):
    settings = prepare(tmp_path, model, workers=workers, read=ReadOptions(chunk_bytes=200))
    lines = (tmp_path / "in.jsonl").read_bytes().splitlines(keepends=True)
    lines[100], lines[104], lines[200] = b'{"text": 1}\n', b"{\n", b"\xff\n"
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"in\.jsonl:101 \(byte \d+\): 'text' is a JSON number"):
        run_quietly(settings)
    assert written(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_invalid_documents_are_skipped_counted_and_reported(tmp_path, model, workers):
    settings = prepare(tmp_path, model, workers=workers, on_error="skip")
    lines = (tmp_path / "in.jsonl").read_bytes().splitlines(keepends=True)
    for number in range(10, 60):
        lines[number] = b'{"text": ""}\n'
    lines[100], lines[200] = b"{\n", b"\xff\n"
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    report = run_quietly(settings)
    assert report.log.counts == {"empty": 50, "broken_json": 1, "invalid_utf8": 1}
    manifest = read_manifest(tmp_path / "out")
    assert manifest.skipped == {"broken_json": 1, "empty": 50, "invalid_utf8": 1}
    assert manifest.documents == len(TEXTS) - 52
    text = "\n".join(report.lines())
    assert "in.jsonl:11 (byte" in text and "in.jsonl:13 (byte" in text and "in.jsonl:14 (byte" not in text
    assert "skipped documents: 1 broken_json, 50 empty, 1 invalid_utf8" in text


def test_each_part_of_a_split_records_what_the_whole_run_left_out(tmp_path, model):
    run_quietly(prepare(tmp_path, model, [*TEXTS, "", " "], on_error="skip", split=Split.parse("a=1,b=1")))
    assert read_manifest(tmp_path / "out_a").skipped == read_manifest(tmp_path / "out_b").skipped == {"empty": 2}


def test_text_without_tokens_is_an_empty_document(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.normalizer = tokenizers.normalizers.Replace("gone", "")
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    settings = prepare(tmp_path, tmp_path / "tokenizer.json", ["a a", "gone", "a"], on_error="skip")
    report = run_quietly(settings)
    assert report.log.counts == {"empty": 1}
    assert documents_of(tmp_path / "out") == [[0, 0, 1], [0, 1]]


def test_existing_outputs_are_kept_unless_told(tmp_path, model):
    settings = prepare(tmp_path, model)
    for name in ("out.bin", "out.idx", "out.json"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(UserError, match=f"{name}: exists already"):
            run_quietly(settings)
        assert (tmp_path / name).read_text() == "precious"
        assert written(tmp_path) == [name]
        (tmp_path / name).unlink()
    (tmp_path / "out.bin").write_text("old")
    run_quietly(dataclasses.replace(settings, overwrite=True))
    assert len(documents_of(tmp_path / "out")) == len(TEXTS)


def test_what_is_to_be_replaced_survives_a_run_that_fails(tmp_path, model):
    settings = prepare(tmp_path, model)
    run_quietly(settings)
    before = {name: (tmp_path / name).read_bytes() for name in written(tmp_path)}
    (tmp_path / "in.jsonl").write_text("broken")
    with pytest.raises(UserError, match="broken JSON"):
        run_quietly(dataclasses.replace(settings, overwrite=True))
    assert {name: (tmp_path / name).read_bytes() for name in written(tmp_path)} == before


def test_an_input_is_never_an_output(tmp_path, model):
    settings = prepare(tmp_path, model, overwrite=True)
    (tmp_path / "in.json").write_text('{"text": "a"}\n')
    sources = find_sources([tmp_path / "in.json"])
    with pytest.raises(UserError, match=r"in\.json: is an input"):
        run_quietly(dataclasses.replace(settings, sources=sources, output_prefix=tmp_path / "in"))
    assert (tmp_path / "in.json").read_text() == '{"text": "a"}\n'


def test_the_tokenizer_is_never_an_output(tmp_path, model):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    for path, given in ((tmp_path / "words.json",) * 2, (tmp_path / "t" / "tokenizer.json", tmp_path / "t")):
        path.parent.mkdir(exist_ok=True)
        words.save(str(path))
        before = path.read_bytes()
        settings = prepare(tmp_path, given, ["a"], append_eod=False, overwrite=True)
        with pytest.raises(UserError, match=rf"{path.name}: is an input"):
            run_quietly(dataclasses.replace(settings, output_prefix=path.with_suffix("")))
        assert path.read_bytes() == before


def test_no_documents_at_all_are_refused(tmp_path, model):
    with pytest.raises(UserError, match=r"--input \S+/in\.jsonl: held no usable document \(skipped: none\)"):
        run_quietly(prepare(tmp_path, model, []))
    with pytest.raises(UserError, match=r"held no usable document \(skipped: 2 empty\)"):
        run_quietly(prepare(tmp_path, model, ["", " "], on_error="skip"))
    assert written(tmp_path) == []


def test_append_eod_needs_a_token_for_it(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-document token, but --append-eod"):
        run_quietly(prepare(tmp_path, tmp_path / "tokenizer.json", ["a"]))


def test_a_tokenizer_that_changes_during_the_run_is_noticed(tmp_path, model):
    with pytest.raises(UserError, match="was changed during the run"):
        ChunkEncoder.load(prepare(tmp_path, model), "sha256:of another one", "reference")


def test_a_part_that_fails_at_the_end_takes_the_others_with_it(tmp_path, model, monkeypatch):
    """The disk fills while the second part is completed: the first one, complete already, must not look like a run."""
    complete = IndexedDatasetBuilder.complete

    def complete_all_but_b(builder, make_manifest):
        if builder.prefix.name == "out_b":
            raise UserError(builder.prefix, "cannot write: No space left on device")
        complete(builder, make_manifest)
        assert (tmp_path / "out_a.json.tmp").exists()

    monkeypatch.setattr(IndexedDatasetBuilder, "complete", complete_all_but_b)
    with pytest.raises(UserError, match="No space left"):
        run_quietly(prepare(tmp_path, model, split=Split.parse("a=1,b=1")))
    assert written(tmp_path) == []


def test_zero_workers_are_refused(tmp_path, model):
    with pytest.raises(UserError, match="0 workers"):
        run_quietly(prepare(tmp_path, model, workers=0))
    assert written(tmp_path) == []
