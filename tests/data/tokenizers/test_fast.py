"""The fast engine: the reference's ids or none."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from text_helpers import DOCUMENTS, numbered_documents, train, write_jsonl

from megachiar.data.inputs.documents import Document
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing import encoder
from megachiar.data.preprocessing.encoder import count_words
from megachiar.data.preprocessing.ordered_pool import LARGEST_GROWTH as POOL_GROWTH
from megachiar.data.preprocessing.ordered_pool import ordered_map
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.tokenizers import fast as module
from megachiar.data.tokenizers.fast import CHECKED_EVERY, HARD_TEXTS, LARGEST_GROWTH, FastTokenizer, choose_engine
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError
from megachiar.process_memory import give_back_free_memory, own_bytes

pytestmark = pytest.mark.every_python

gigatoken = pytest.importorskip("gigatoken")


@pytest.fixture(scope="module", params=["huggingface", "sentencepiece"])
def reference(request, tmp_path_factory):
    return load_tokenizer(train(tmp_path_factory.mktemp("tokenizer"), request.param))


def test_ids_are_the_references_or_the_engine_is_refused(reference):
    """Byte-level BPE is served; a SentencePiece model that gigatoken cannot read equally is not."""
    chosen = choose_engine("auto", reference, DOCUMENTS)
    if chosen.kind == "reference":
        assert reference.kind == "sentencepiece"
        with pytest.raises(UserError, match=r"reference|cannot serve"):
            choose_engine("fast", reference, DOCUMENTS)
        return
    fast, texts = FastTokenizer(reference), [*HARD_TEXTS, *DOCUMENTS, *numbered_documents(50)]
    for text, ids in zip(texts, fast.encode_batch(texts), strict=True):
        assert np.array_equal(ids, reference.encode(text)), text
    assert (fast.vocab_size, fast.eod_id, fast.fingerprint) == (
        reference.vocab_size,
        reference.eod_id,
        reference.fingerprint,
    )


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return load_tokenizer(train(tmp_path_factory.mktemp("tokenizer"), "huggingface"))


def test_control_strings_in_text_stay_text(byte_level):
    end = byte_level.controls[byte_level.eod_id]
    assert byte_level.eod_id in gigatoken.Tokenizer.from_json(byte_level.definition()).encode(f"a{end}b")
    ids = FastTokenizer(byte_level).encode(f"a {end} b {end}")
    assert byte_level.eod_id not in ids and byte_level.decode(ids) == f"a {end} b {end}"


@pytest.fixture
def broken(monkeypatch):
    """A fast engine that errs wherever a text holds "zebra"."""
    real = FastTokenizer.__init__

    def broken_init(self, reference):
        real(self, reference)
        encode = self._encode
        self._encode = lambda text: encode(text)[1:] if "zebra" in text else encode(text)

    monkeypatch.setattr(FastTokenizer, "__init__", broken_init)


def test_a_difference_on_the_inputs_first_documents_ends_its_use(byte_level, broken):
    with pytest.raises(UserError, match="gives other ids than the reference") as refused:
        choose_engine("fast", byte_level, ["a zebra"])
    assert "--engine reference" in refused.value.remedy
    chosen = choose_engine("auto", byte_level, ["a zebra"])
    assert chosen.kind == "reference" and "gives other ids" in chosen.reason
    assert choose_engine("auto", byte_level, ["a horse"]).kind == "fast"


def test_a_difference_later_on_is_found_by_looking_now_and_then(byte_level, broken):
    fast = FastTokenizer(byte_level)
    for _ in range(CHECKED_EVERY):
        fast.encode_batch(["a horse"])
    with pytest.raises(UserError, match="gives other ids"):
        fast.encode_batch(["a zebra"])


def test_what_gigatoken_remembers_is_bounded(byte_level, monkeypatch):
    """Memory that grows beyond the limit ends with a new engine, which gives the same ids."""
    held = iter([100, 100 + LARGEST_GROWTH, 101 + LARGEST_GROWTH, 102, 102 + LARGEST_GROWTH])
    monkeypatch.setattr(module, "own_bytes", lambda: next(held))
    fast, engines = FastTokenizer(byte_level), []
    for _ in range(3 * CHECKED_EVERY + 2):
        assert np.array_equal(fast.encode_batch(["a horse"])[0], byte_level.encode("a horse"))
        if fast._encode not in engines:
            engines.append(fast._encode)
    assert len(engines) == 2


def test_diverse_text_does_not_fill_the_workers_memory(byte_level):
    """Words that never come again: gigatoken by itself keeps them all."""

    def growth(number: int) -> int:
        rng = np.random.default_rng(number)
        letters = rng.integers(ord("a"), ord("z") + 1, (20_000, 10), np.uint8)
        letters[:, 0] = ord(" ")
        fast.encode_batch([letters.tobytes().decode()])
        return own_bytes() - began

    fast, began = FastTokenizer(byte_level), own_bytes()
    bounded = max(ordered_map(lambda: growth, range(1, 81), 2, fork=True))
    alone = max(map(growth, range(1, 41)))  # as many as each of the two had
    assert bounded < POOL_GROWTH + (12 << 20) and alone > 1.5 * bounded


def test_control_strings_are_found_in_every_group_of_texts(byte_level, monkeypatch):
    monkeypatch.setattr(module, "GROUP_CHARACTERS", 40)
    end = byte_level.controls[byte_level.eod_id]
    texts = ["a", f"b {end}", "c" * 50, f"{'d' * 50} {end}", "", "e", "f" * 39, f"g {end}"]
    for text, ids in zip(texts, FastTokenizer(byte_level).encode_batch(texts), strict=True):
        assert np.array_equal(ids, byte_level.encode(text)) and byte_level.eod_id not in ids


def test_large_blocks_are_given_back_at_once():
    """Also after some were freed, which is when glibc begins to keep them."""
    program = (
        "from megachiar.process_memory import keep_large_blocks_apart, own_bytes\n"
        "keep_large_blocks_apart()\n"
        "for _ in range(3):\n"
        "    before, blocks = own_bytes(), [b'x' * (6 << 20) for _ in range(4)]\n"
        "    small, held = bytes(600), own_bytes()\n"
        "    blocks.clear()\n"
        "    assert held - before > 20 << 20 and own_bytes() - before < 2 << 20\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_memory_is_told_and_given_back():
    give_back_free_memory()
    before = own_bytes()
    kept, freed = [], []
    for number in range(200_000):
        (freed if number % 100 else kept).append(bytes(600))  # above Python's own small blocks
    held = own_bytes()
    freed.clear()
    give_back_free_memory()
    assert before + 100_000_000 < held and own_bytes() < held - 80_000_000


def test_without_gigatoken_the_reference_serves_and_fast_says_what_to_install(byte_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UserError, match=r"needs gigatoken") as refused:
        choose_engine("fast", byte_level, [])
    assert "megachiar[fast]" in refused.value.remedy
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_engine("auto", byte_level, []).kind == "reference"


@pytest.mark.parametrize("workers", [1, 2])
def test_both_engines_write_the_same_files(tmp_path, byte_level, workers):
    end = byte_level.controls[byte_level.eod_id]
    corpus = write_jsonl(tmp_path / "in.jsonl", [*DOCUMENTS, f"an {end} inside", *numbered_documents(300)])
    for engine in ("fast", "reference"):
        (tmp_path / engine).mkdir()
        settings = PreprocessSettings(
            find_sources([corpus]),
            byte_level.path,
            tmp_path / engine / "out",
            append_eod=True,
            engine=engine,
            workers=workers,
        )
        assert preprocess(settings).engine.startswith(engine)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / "fast" / f"out.{suffix}").read_bytes() == (
            tmp_path / "reference" / f"out.{suffix}"
        ).read_bytes()


@pytest.mark.parametrize(
    "text", ["", " ", "a", " a  b\tc\n", "\x1c\x1da\x1eb\x1f", "a\x0b\x0cb\r\n", "é\u2003ü \x85x", "_ - ."]
)
def test_words_are_what_split_finds(text):
    assert count_words([Document(text, text.encode())]) == len(text.split())


def test_words_of_several_documents_are_those_of_each():
    texts = ["a b", "c", "", " d ", "é f\x85g", "h"]
    assert count_words(Document(text, text.encode()) for text in texts) == sum(len(text.split()) for text in texts)
    assert count_words([]) == 0


def test_words_are_counted_across_blocks(monkeypatch):
    monkeypatch.setattr(encoder, "COUNTED_AT_ONCE", 3)
    for text in ("abc def", "abcd", "ab  cd", "  ab", "a b c d e", "äbc def", "äbcd", "äb  cd  ", "  äb", "ä b c d e"):
        assert count_words([Document(text, text.encode())]) == len(text.split()), text


def test_every_ascii_character_is_whitespace_or_not_as_in_split():
    for code in range(128):
        text = f"a{chr(code)}b"
        assert count_words([Document(text, text.encode())]) == len(text.split()), code
