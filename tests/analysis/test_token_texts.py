"""The texts of tokens join to the text that the tokenizer decodes, and each token has its class."""

from __future__ import annotations

import pytest
from text_helpers import DOCUMENTS, numbered_documents, train

from megachiar.analysis.token_texts import CLASSES, token_classes
from megachiar.data.tokenizers.token_reader import TokenReader, TokenText, token_texts
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return load_tokenizer(train(tmp_path_factory.mktemp(request.param), request.param))


@pytest.mark.parametrize(
    "text", [*DOCUMENTS, *numbered_documents(2), "", " ", "\n", "\ufffd\ufffd end", "🙂", "a\ufffd"]
)
def test_texts_join_to_what_the_tokenizer_decodes(tokenizer, text):
    ids = list(tokenizer.encode(text))
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(each.text for each in texts) == tokenizer.decode(ids)


def test_a_space_stays_with_the_token_that_it_leads(tokenizer):
    ids = list(tokenizer.encode("old ships sail home while the lazy dog jumps over"))
    texts = [each.text for each in token_texts(tokenizer, ids)]
    led = [text for text in texts if text.startswith(" ") and text.strip()]
    assert len(led) >= 4 and not any(text.strip() and text.endswith(" ") for text in texts)


def test_a_character_of_several_tokens_stands_at_its_last_one(tokenizer):
    ids = list(tokenizer.encode("a 峠 b"))
    texts = [each.text for each in token_texts(tokenizer, ids)]
    assert any("峠" in text for text in texts), "the vocabulary has the bytes of any character"
    assert "" in texts and "\ufffd" not in "".join(texts)
    last = next(place for place, text in enumerate(texts) if "峠" in text)
    cut = token_texts(tokenizer, ids[:last])
    assert "\ufffd" in cut[-1].text and len(cut) == last, "an unfinished character is shown as one"


def test_control_tokens_have_a_name_and_no_text(tokenizer):
    end, name = next(iter(tokenizer.controls.items()))
    ids = [*tokenizer.encode("the fox"), end, *tokenizer.encode("the dog")]
    texts = token_texts(tokenizer, ids)
    control = next(text for text in texts if text.control is not None)
    assert control == TokenText("", name)
    assert "".join(each.text for each in texts) == "the foxthe dog"


def test_tokens_can_be_read_one_by_one(tokenizer):
    ids = list(tokenizer.encode(DOCUMENTS[2]))
    reader = TokenReader(tokenizer)
    one_by_one = [reader.read(token) for token in ids]
    assert "".join(each.text for each in one_by_one) + reader.rest() == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        (["The", " cat", " sat"], ["word"] * 3),
        ([" chiar", "os", "curo", "!"], ["word start", "word part", "word part", "punctuation"]),
        (["x", "\n", "\n\n", " ", "y"], ["word", "whitespace", "whitespace", "whitespace", "word"]),
        ([" 12", ",", "000", " 3.5", " ½"], ["number", "punctuation", "number", "number", "number"]),
        ([" 1st", " x", "2"], ["word", "word start", "number"]),
        (["don", "'", "t", " (", "e.g", ".)"], ["word", "punctuation", "word", "punctuation", "word", "punctuation"]),
        ([" caf", "e", "\u0301", "s"], ["word start", "word part", "word part", "word part"]),
        (["日", "本", "。"], ["word start", "word part", "punctuation"]),
        (["a", "", "", "峠"], ["word start", "part of a character", "part of a character", "word part"]),
        (["\ufffd", "a"], ["part of a character", "word"]),
        ([" $", " +", " 🙂"], ["punctuation"] * 3),
    ],
)
def test_classes(texts, classes):
    assert token_classes([TokenText(text, None) for text in texts]) == classes
    assert set(classes) <= set(CLASSES)


def test_a_control_token_ends_a_word():
    texts = [TokenText("to", None), TokenText("", "</s>"), TokenText("be", None)]
    assert token_classes(texts) == ["word", "control", "word"]
