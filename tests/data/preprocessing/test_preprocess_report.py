"""What a run says of itself: how documents end, unknown tokens, and documents that the tokenizer cannot encode."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import tokenizers
from text_helpers import numbered_documents, run_tool, train, write_jsonl

from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.split import Split
from megachiar.data.storage.manifest import read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError


def word_tokenizer(path: Path, replace: tuple[str, str] | None = None) -> Path:
    """Words are looked up; ``replace``: (text, what the normalizer makes of it)."""
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["</s>", "[UNK]"])
    if replace:
        words.normalizer = tokenizers.normalizers.Replace(*replace)
    words.save(str(path))
    return path


def settings(folder: Path, tokenizer: Path, texts: list[str], **changes: object) -> PreprocessSettings:
    values = {"read": ReadOptions(chunk_bytes=40), "append_eod": True, **changes}
    return PreprocessSettings(
        find_sources([write_jsonl(folder / "in.jsonl", texts)]), tokenizer, folder / "out", **values
    )


def report_of(wanted: PreprocessSettings) -> str:
    return "\n".join(preprocess(wanted, io.StringIO()).lines())


# --- documents that become control tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_becomes_a_control_token_is_skipped_with_its_place(tmp_path, workers):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", ("END", "</s>"))
    texts = ["a b", "a END", "b", "a </s> b", "END b", "b a"] + ["a"] * 50
    wanted = settings(tmp_path, tokenizer, texts, on_error="skip", workers=workers)
    report = preprocess(wanted, io.StringIO())
    assert report.log.counts == {"control_token": 2}
    lines = write_jsonl(tmp_path / "again.jsonl", texts).read_bytes().splitlines(keepends=True)
    assert [invalid.where for invalid in report.log.examples] == [
        f"{tmp_path}/in.jsonl:{line + 1} (byte {sum(map(len, lines[:line]))})" for line in (1, 4)
    ]
    assert report.log.examples[0].problem == "the tokenizer encodes ordinary text as the control token '</s>'"
    dataset = IndexedDataset(tmp_path / "out")
    assert [dataset.document(number).tolist() for number in range(4)] == [[1, 2, 3], [2, 3], [1, 0, 0, 2, 3], [2, 1, 3]]
    assert read_manifest(tmp_path / "out").skipped == {"control_token": 2}
    assert "skipped documents: 2 control_token" in "\n".join(report.lines())


def test_a_document_that_becomes_a_control_token_is_refused_with_its_place(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", ("END", "</s>"))
    write_jsonl(tmp_path / "in.jsonl", ["a", "a END", "b"])
    arguments = ("--tokenizer", tokenizer, "--output-prefix", tmp_path / "out", "--workers", 2)
    done = run_tool("preprocess_data", "--input", tmp_path / "in.jsonl", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "in.jsonl:2 (byte 23): the tokenizer encodes ordinary text as the control token '</s>'" in done.stderr
    assert "--on-error skip" in done.stderr


def test_the_first_invalid_document_of_the_input_is_named_whatever_kind_it_is(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", ("END", "</s>"))
    wanted = settings(tmp_path, tokenizer, ["a", "a END", "b", ""], read=ReadOptions())
    with pytest.raises(UserError, match=r"in\.jsonl:2 .*control token"):
        preprocess(wanted, io.StringIO())


def test_the_fast_engine_skips_what_the_reference_does(tmp_path):
    """Its first documents, too, by which the engine is chosen."""
    pytest.importorskip("gigatoken")
    folder = tmp_path / "t"
    folder.mkdir()
    whole = tokenizers.Tokenizer.from_file(str(train(folder, "huggingface")))
    whole.add_special_tokens(["fox jumps"])
    whole.save(str(folder / "tokenizer.json"))
    reference = load_tokenizer(folder / "tokenizer.json")
    texts = ["the fox jumps over", *numbered_documents(50)]
    kept = []
    for text in texts:
        try:
            kept.append(reference.encode(text))
        except UserError:
            continue
    for engine in ("auto", "reference"):
        wanted = settings(tmp_path, folder / "tokenizer.json", texts, engine=engine, on_error="skip", overwrite=True)
        preprocess(wanted, io.StringIO())
        dataset = IndexedDataset(tmp_path / "out")
        assert [dataset.document(n)[:-1].tolist() for n in range(dataset.documents)] == kept


# --- how documents end, and what is unknown ---------------------------------------------------------------------------


def test_the_report_says_how_documents_end(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json")
    assert "each document ends with '</s>' (id 3)" in report_of(settings(tmp_path, tokenizer, ["a"]))
    without = settings(tmp_path, tokenizer, ["a"], append_eod=False, overwrite=True)
    assert "documents end with no token: --append-eod adds '</s>' (id 3)" in report_of(without)
    named = settings(tmp_path, tokenizer, ["a"], eod_token="b", overwrite=True)
    assert "each document ends with 'b' (id 2)" in report_of(named)
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    plain.save(str(tmp_path / "plain.json"))
    none = settings(tmp_path, tmp_path / "plain.json", ["a"], append_eod=False, overwrite=True)
    assert "documents end with no token of their own: the tokenizer has none" in report_of(none)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_report_counts_unknown_tokens_of_each_part(tmp_path, workers):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json")
    texts = [f"a x{number} b y" for number in range(40)]
    wanted = settings(tmp_path, tokenizer, texts, workers=workers, split=Split.parse("u=1,v=1"))
    report = preprocess(wanted, io.StringIO())
    for line, (prefix, count) in zip(report.lines(), report.unknown_tokens.items(), strict=False):
        assert count == (IndexedDataset(prefix).tokens == 0).sum() > 0
        assert line.startswith(f"{prefix}.bin/.idx") and line.endswith(f", {count} <unk> (id 0)")
    assert sum(report.unknown_tokens.values()) == 80


def test_a_tokenizer_of_bytes_has_no_unknown_token(tmp_path):
    tokenizer = train(tmp_path, "huggingface")
    assert load_tokenizer(tokenizer).unknown_id is None
    assert "no <unk> in the vocabulary" in report_of(settings(tmp_path, tokenizer, ["日本"]))


def test_sentencepiece_tells_its_unknown_token(tmp_path):
    assert load_tokenizer(train(tmp_path, "sentencepiece")).unknown_id == 0
