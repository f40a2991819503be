"""Training tokenizers: the vocabulary asked for, the same file each time, and clear limits."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from text_helpers import DOCUMENTS, numbered_documents, run_tool, write_jsonl

from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.tokenizer_training import TrainingSettings, sample_texts, train_tokenizer
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python

TEXTS = DOCUMENTS + numbered_documents(200)
KINDS = [("sentencepiece", "bpe", "t.model"), ("sentencepiece", "unigram", "t.model"), ("huggingface", "bpe", "t.json")]


def prepare(folder: Path, texts: list[str] | None = None, **changes) -> TrainingSettings:
    corpus = write_jsonl(folder / "in.jsonl", TEXTS if texts is None else texts)
    settings = {"output": folder / "t.model", "vocab_size": 340, **changes}
    return TrainingSettings(find_sources([corpus]), **settings)


def train(settings: TrainingSettings):
    return train_tokenizer(settings, io.StringIO())


@pytest.mark.parametrize(("kind", "algorithm", "name"), KINDS)
def test_the_vocabulary_has_the_size_asked_for_and_text_comes_back(tmp_path, kind, algorithm, name):
    report = train(prepare(tmp_path, kind=kind, algorithm=algorithm, output=tmp_path / name))
    tokenizer = load_tokenizer(tmp_path / name)
    assert tokenizer.kind == kind
    assert tokenizer.vocab_size == report.tokenizer.vocab_size == 340
    assert tokenizer.eod_id is not None
    for text in [*TEXTS[:20], "never seen: ŊæœŒß 漢字 \n\n\n\t  x  "]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert report.used_documents == report.read_documents == len(TEXTS)
    assert report.used_bytes == report.read_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize(("kind", "algorithm", "name"), KINDS)
def test_the_same_corpus_gives_the_same_file(tmp_path, kind, algorithm, name):
    """Also in another process, where hashes of strings and threads fall out differently."""
    corpus = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    made = []
    for run in ("a", "b", "c"):
        output = tmp_path / run / name
        arguments = ["--input", corpus, "--vocab-size", 340, "--output", output]
        done = run_tool("train_tokenizer", *arguments, "--kind", kind, "--algorithm", algorithm)
        assert done.returncode == 0, done.stderr
        assert "340 tokens" in done.stderr
        made.append(output.read_bytes())
    assert made[0] == made[1] == made[2]


def test_a_new_line_is_one_token_and_spaces_are_kept(tmp_path):
    train(prepare(tmp_path))
    tokenizer = load_tokenizer(tmp_path / "t.model")
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    assert tokenizer.encode("a\n\nb").count(newline[0]) == 2
    for text in ("  a", "a  ", "a    b", " "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_mark_for_a_space_is_the_only_character_that_does_not_come_back(tmp_path):
    train(prepare(tmp_path))
    tokenizer = load_tokenizer(tmp_path / "t.model")
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    lost = [
        character
        for character in characters
        if tokenizer.decode(tokenizer.encode(f"a{character}b")) != f"a{character}b"
    ]
    assert lost == ["\u2581"]
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_long_lines_are_learned_from_too(tmp_path):
    """SentencePiece leaves out sentences above 4,192 bytes without a word."""
    line = "unmistakable " * 2000
    train(prepare(tmp_path, [line], vocab_size=290))
    assert len(load_tokenizer(tmp_path / "t.model").encode("a unmistakable b")) <= 5
    with_letters_only = "Ω" * 100_000
    train(prepare(tmp_path, [with_letters_only, line], vocab_size=290, overwrite=True))
    assert len(load_tokenizer(tmp_path / "t.model").encode("Ω")) == 1


@pytest.mark.parametrize(("kind", "algorithm", "name"), KINDS)
def test_a_vocabulary_too_large_for_the_corpus_is_refused(tmp_path, kind, algorithm, name):
    settings = prepare(tmp_path, kind=kind, algorithm=algorithm, output=tmp_path / name, vocab_size=50_000)
    with pytest.raises(UserError, match=r"--vocab-size 50000: the corpus is too small: it gives at most \d+ tokens"):
        train(settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_the_largest_possible_vocabulary_that_the_error_names_works(tmp_path):
    with pytest.raises(UserError) as caught:
        train(prepare(tmp_path, kind="huggingface", output=tmp_path / "t.json", vocab_size=50_000))
    possible = int(caught.value.problem.split()[-2])
    train(prepare(tmp_path, kind="huggingface", output=tmp_path / "t.json", vocab_size=possible))
    assert load_tokenizer(tmp_path / "t.json").vocab_size == possible


def test_a_vocabulary_too_small_for_the_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="10 tokens; the 256 bytes alone"):
        train(prepare(tmp_path, vocab_size=10))
    with pytest.raises(UserError, match=r"--vocab-size 270: the bytes and characters of this corpus alone take \d+"):
        train(prepare(tmp_path, vocab_size=270))


def test_nothing_to_learn_from_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--input \S+/in\.jsonl: held no usable document"):
        train(prepare(tmp_path, []))
    with pytest.raises(UserError, match="SentencePiece cannot train"):
        train(prepare(tmp_path, ["\x00"]))


def test_outputs_are_checked_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"t\.json: a sentencepiece tokenizer is a \.model file"):
        train(prepare(tmp_path, output=tmp_path / "t.json"))
    with pytest.raises(UserError, match="a huggingface tokenizer is trained by bpe"):
        train(prepare(tmp_path, kind="huggingface", output=tmp_path / "t.json", algorithm="unigram"))
    (tmp_path / "t.model").write_text("precious")
    with pytest.raises(UserError, match=r"t\.model: exists already"):
        train(prepare(tmp_path))
    assert (tmp_path / "t.model").read_text() == "precious"
    train(prepare(tmp_path, overwrite=True))
    assert load_tokenizer(tmp_path / "t.model").vocab_size == 340
    (tmp_path / "in.json").write_text(json.dumps({"text": "a"}))
    settings = TrainingSettings(
        find_sources([tmp_path / "in.json"]), tmp_path / "in.json", 300, "huggingface", overwrite=True
    )
    with pytest.raises(UserError, match="is an input"):
        train(settings)


def test_broken_documents_are_refused_or_skipped(tmp_path):
    settings = prepare(tmp_path, on_error="skip")
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write("{\n")
    assert train(settings).log.counts == {"broken_json": 1}
    with pytest.raises(UserError, match="broken JSON"):
        train(prepare_again(settings))


def prepare_again(settings: TrainingSettings) -> TrainingSettings:
    return TrainingSettings(settings.sources, settings.output, 340, overwrite=True)


def test_a_large_corpus_is_sampled_evenly_whatever_its_order():
    texts = [f"{number:05} " + "x" * 94 for number in range(10_000)]
    sample = sample_texts(texts, 100_000)
    assert len(sample) == 1000
    assert sample == sorted(sample), "in the order of the corpus"
    assert set(sample_texts(reversed(texts), 100_000)) == set(sample)
    halves = sum(text < "05000" for text in sample)
    assert 420 < halves < 580
    assert sample_texts(texts, 10**9) == texts
    assert sample_texts(["too large for the limit"], 1) == ["too large for the limit"]


@pytest.mark.parametrize("size", [0, -1 << 20])
def test_a_sample_of_nothing_is_refused(tmp_path, size):
    with pytest.raises(UserError, match=rf"--max-text-mib: {size >> 20} MiB of text"):
        train(prepare(tmp_path, max_text_bytes=size))


def test_the_sample_is_what_is_trained_on(tmp_path):
    report = train(prepare(tmp_path, max_text_bytes=10_000, vocab_size=310))
    assert report.used_bytes <= 10_000 < report.read_bytes
    assert report.used_documents < report.read_documents == len(TEXTS)


def test_text_files_are_read_as_for_preprocessing(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(numbered_documents(200)).encode()))
    settings = TrainingSettings(
        find_sources([tmp_path / "a.txt.gz"]), tmp_path / "a.model", 330, read=ReadOptions(txt_documents="line")
    )
    assert train(settings).read_documents == 200


def test_the_tool_reports_problems_and_leaves_nothing(tmp_path):
    done = run_tool("train_tokenizer", "--input", "-", "--vocab-size", 9000, "--output", tmp_path / "t.json", stdin=b"")
    assert done.returncode == 2
    assert "held no usable document" in done.stderr and "Traceback" not in done.stderr
    content = write_jsonl(tmp_path / "in.jsonl", TEXTS).read_bytes()
    arguments = ("--input", "-", "--vocab-size", 340, "--output", tmp_path / "t.json")
    done = run_tool("train_tokenizer", *arguments, stdin=content)
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(tmp_path / "t.json").kind == "huggingface"


def test_a_full_disk_leaves_no_tokenizer(tmp_path):
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); import runpy, sys;"
    script = Path(__file__).resolve().parents[3] / "tools" / "train_tokenizer.py"
    corpus = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    arguments = ["--input", str(corpus), "--vocab-size", "340", "--output", str(tmp_path / "t.model")]
    code += f"sys.argv[1:] = {arguments!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "cannot write: File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
