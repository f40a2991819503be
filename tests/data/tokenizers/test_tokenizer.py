"""Tokenizers: the same ids as their own libraries, round trips, control strings, and files that are no tokenizers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from text_helpers import DOCUMENTS, numbered_documents, train

from megachiar.data.tokenizers.control_guard import ControlTokenError
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python

CONTROL_TEXT = "a</s>b <s> <|endoftext|><|endoftext|>c [SEP]"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """One trained tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    paths = {kind: train(folder, kind) for kind in ("sentencepiece", "huggingface")}
    paths["gpt2"] = write_gpt2(folder / "gpt2", paths["huggingface"])
    return paths


def write_gpt2(folder: Path, tokenizer_json: Path, names: tuple[str, str] = ("vocab.json", "merges.txt")) -> Path:
    """GPT-2's two files, from the same vocabulary as ``tokenizer_json``."""
    model = json.loads(tokenizer_json.read_text())["model"]
    folder.mkdir()
    (folder / names[0]).write_text(json.dumps(model["vocab"]))
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    return folder


def write_json(path: Path, tokenizer: tokenizers.Tokenizer) -> Path:
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "gpt2"])
def test_documents_come_back_as_they_were(models, kind):
    tokenizer = load_tokenizer(models[kind])
    assert tokenizer.kind == kind
    for text in [*DOCUMENTS, CONTROL_TEXT, " ", "\n", "\r\n\r\n", "x" * 5000, ""]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= index < tokenizer.vocab_size for index in ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "gpt2"])
def test_a_batch_gives_what_single_texts_give(models, kind):
    tokenizer = load_tokenizer(models[kind])
    texts = [*DOCUMENTS, *numbered_documents(5), CONTROL_TEXT]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "gpt2"])
def test_control_strings_in_text_are_text(models, kind):
    tokenizer = load_tokenizer(models[kind])
    assert tokenizer.eod_id is not None
    assert tokenizer.eod_id not in tokenizer.encode(CONTROL_TEXT)
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod_id]) == "a"


def test_sentencepiece_gives_the_librarys_ids(models):
    library = sentencepiece.SentencePieceProcessor(model_file=str(models["sentencepiece"]))
    tokenizer = load_tokenizer(models["sentencepiece"])
    for text in DOCUMENTS:
        assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.vocab_size == library.vocab_size() == 400
    assert tokenizer.eod_id == library.eos_id()


def test_huggingface_gives_the_librarys_ids(models):
    library = tokenizers.Tokenizer.from_file(str(models["huggingface"]))
    tokenizer = load_tokenizer(models["huggingface"])
    for text in [*DOCUMENTS[:3], DOCUMENTS[4]]:  # the other one holds the control string
        assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.vocab_size == library.get_vocab_size() == 400
    assert tokenizer.eod_id == library.token_to_id("<|endoftext|>")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_files_give_the_ids_of_the_same_vocabulary(models, tmp_path, names):
    folder = write_gpt2(tmp_path / "gpt2", models["huggingface"], names)
    reference = load_tokenizer(models["huggingface"])
    for path in (folder, folder / names[0], folder / names[1]):
        tokenizer = load_tokenizer(path)
        assert tokenizer.kind == "gpt2"
        assert tokenizer.eod_id == reference.eod_id
        assert tokenizer.encode_batch(DOCUMENTS) == reference.encode_batch(DOCUMENTS)


def test_gpt2_splits_text_by_gpt2s_rule(models):
    """Letters with one space before them, digits, other signs: no token crosses from one to the other."""
    tokenizer = load_tokenizer(models["gpt2"])
    text = "It's 1234 over!!  quick"
    pieces = [tokenizer.decode(ids) for ids in ([index] for index in tokenizer.encode(text))]
    boundaries = {0, 2, 4, 9, 14, 16, 17, 23}
    ends = [sum(map(len, pieces[: number + 1])) for number in range(len(pieces))]
    assert boundaries <= {0, *ends}


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "gpt2"])
def test_the_fingerprint_is_that_of_the_content(models, tmp_path, kind):
    source = models[kind]
    copy = tmp_path / source.name
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy(source, copy)
    fingerprint = load_tokenizer(source).fingerprint
    assert fingerprint.startswith("sha256:") and len(fingerprint) == 7 + 64
    assert load_tokenizer(copy).fingerprint == fingerprint
    if kind == "gpt2":
        changed = copy / "merges.txt"
        parts = [hashlib.sha256((copy / name).read_bytes()).digest() for name in ("vocab.json", "merges.txt")]
        assert fingerprint[7:] == hashlib.sha256(b"".join(parts)).hexdigest()
    else:
        changed = copy
        assert fingerprint[7:] == hashlib.sha256(copy.read_bytes()).hexdigest()
    if kind != "sentencepiece":  # a protobuf has no harmless byte to add
        changed.write_bytes(changed.read_bytes() + b"\n")
        assert load_tokenizer(copy).fingerprint != fingerprint


def test_a_folder_is_recognised_by_what_it_holds(models, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shutil.copy(models["huggingface"], tmp_path / "a" / "tokenizer.json")
    shutil.copy(models["sentencepiece"], tmp_path / "b" / "anything.model")
    assert load_tokenizer(tmp_path / "a").kind == "huggingface"
    assert load_tokenizer(tmp_path / "b").kind == "sentencepiece"
    shutil.copy(models["sentencepiece"], tmp_path / "b" / "other.model")
    with pytest.raises(UserError, match=r"2 \*\.model files"):
        load_tokenizer(tmp_path / "b")
    shutil.copy(models["sentencepiece"], tmp_path / "b" / "tokenizer.model")
    assert load_tokenizer(tmp_path / "b").path == tmp_path / "b" / "tokenizer.model"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "my.8k.model"])
def test_a_sentencepiece_model_is_recognised_by_its_name(models, tmp_path, name):
    shutil.copy(models["sentencepiece"], tmp_path / name)
    assert load_tokenizer(tmp_path / name).kind == "sentencepiece"
    shutil.copy(models["sentencepiece"], tmp_path / "tokenizer.bin")
    with pytest.raises(UserError, match=r"tokenizer\.bin: cannot tell what kind"):
        load_tokenizer(tmp_path / "tokenizer.bin")
    assert load_tokenizer(tmp_path / "tokenizer.bin", "sentencepiece").vocab_size == 400


def test_the_end_of_document_token_can_be_named(models):
    for kind in ("huggingface", "gpt2", "sentencepiece"):
        vocabulary_token = "a"
        tokenizer = load_tokenizer(models[kind], eod_token=vocabulary_token)
        assert tokenizer.decode([tokenizer.eod_id]) in ("", "a")
        with pytest.raises(UserError, match=r"'nowhere' \(--eod-token\) is not in the vocabulary"):
            load_tokenizer(models[kind], eod_token="nowhere")


@pytest.mark.parametrize("token", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]"])
def test_the_known_end_of_document_tokens_are_found(tmp_path, token):
    tokenizer = word_level(["[UNK]", "a", "b"], [token])
    loaded = load_tokenizer(write_json(tmp_path / "tokenizer.json", tokenizer))
    assert loaded.eod_id == tokenizer.token_to_id(token) == 3


def test_an_ordinary_word_is_not_taken_for_the_end_of_document(tmp_path):
    path = write_json(tmp_path / "tokenizer.json", word_level(["[UNK]", "</s>"], []))
    assert load_tokenizer(path).eod_id is None
    assert load_tokenizer(path, eod_token="</s>").eod_id == 1


def word_level(words: list[str], special: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer that looks up what stands between spaces."""
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return tokenizer


def test_control_strings_that_are_ordinary_entries_do_not_become_control_ids(tmp_path):
    """A unigram or word-level vocabulary looks ``</s>`` up like a word; cut apart it is something else."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -5.0) for character in "ab</s>")]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(list(dict(pieces).items()), unk_id=0, byte_fallback=False))
    unigram.add_special_tokens(["</s>"])
    loaded = load_tokenizer(write_json(tmp_path / "unigram.json", unigram))
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "unigram.json"))
    plain.encode_special_tokens = True
    assert loaded.eod_id in plain.encode("a</s>b").ids, "the library alone lets it through"
    ids = loaded.encode("a</s>b</s>")
    assert loaded.eod_id not in ids
    assert [plain.id_to_token(index) for index in ids] == list("a</s>b</s>")
    words = load_tokenizer(write_json(tmp_path / "words.json", word_level(["[UNK]", "</s>", "a"], ["</s>"])))
    assert words.eod_id == 1
    assert words.encode("a </s> a") == [2, 0, 0, 2]


def test_control_tokens_that_cannot_be_kept_out_are_refused(tmp_path):
    tokenizer = word_level(["[UNK]", "</s>", "a"], ["</s>"])
    tokenizer.normalizer = tokenizers.normalizers.Replace("END", "</s>")
    loaded = load_tokenizer(write_json(tmp_path / "tokenizer.json", tokenizer))
    with pytest.raises(UserError, match="control token '</s>'"):
        loaded.encode("a END")


def test_a_user_defined_end_of_document_piece_stays_out_of_text(tmp_path):
    path = tmp_path / "tokenizer.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(numbered_documents(100)),
            model_writer=file,
            vocab_size=330,
            byte_fallback=True,
            user_defined_symbols=["<|endoftext|>"],
            minloglevel=4,
            model_type="bpe",
        )
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    eod = library.piece_to_id("<|endoftext|>")
    assert eod in library.encode("fox<|endoftext|>dog")
    tokenizer = load_tokenizer(path, eod_token="<|endoftext|>")
    assert tokenizer.eod_id == eod
    assert eod not in tokenizer.encode("fox<|endoftext|>dog")


def test_a_model_without_end_of_sentence_has_no_end_of_document(tmp_path):
    path = tmp_path / "tokenizer.model"
    with open(path, "wb") as file:
        texts = iter(numbered_documents(100))
        options = {"vocab_size": 330, "byte_fallback": True, "minloglevel": 4, "model_type": "bpe"}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=file, eos_id=-1, **options)
    assert load_tokenizer(path).eod_id is None
    assert load_tokenizer(path, eod_token="<s>").eod_id == 1


def test_what_a_tokenizer_file_asks_for_does_not_change_documents(models, tmp_path):
    """Truncation, padding, BOS by template and BPE dropout are for other uses."""
    tokenizer = tokenizers.Tokenizer.from_file(str(models["huggingface"]))
    expected = load_tokenizer(models["huggingface"]).encode_batch(DOCUMENTS)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64)
    tokenizer.model.dropout = 0.5
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    loaded = load_tokenizer(write_json(tmp_path / "tokenizer.json", tokenizer))
    assert loaded.encode_batch(DOCUMENTS) == expected


def test_added_tokens_beyond_the_model_count_in_the_vocabulary(models, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(models["huggingface"]))
    tokenizer.add_tokens(["extraordinary"])
    loaded = load_tokenizer(write_json(tmp_path / "tokenizer.json", tokenizer))
    assert loaded.vocab_size == 401
    assert 400 in loaded.encode("an extraordinary day")


def test_a_byte_level_vocabulary_without_all_bytes_is_refused(models, tmp_path):
    folder = write_gpt2(tmp_path / "gpt2", models["huggingface"])
    vocabulary = json.loads((folder / "vocab.json").read_text())
    del vocabulary["Ń"]  # byte 0xAD; no merge uses it
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="lacks 1 of the 256 bytes"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["missing.model", "missing.json", "folder/missing"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: there is no such tokenizer file or folder\n.*path of the file"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B", "nowhere.model", "a/b/c", "/nowhere"])
def test_a_name_that_is_no_path_is_told_how_to_become_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no such tokenizer file or folder") as caught:
        load_tokenizer(name)
    is_name = name in ("gpt2", "meta-llama/Llama-3.2-1B")
    fetch = f"write hf:{name}, which fetches it"
    assert "check the path" in caught.value.remedy and (fetch in caught.value.remedy) == is_name


@pytest.mark.parametrize("name", ["broken.model", "broken.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe garbage", b'{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: is not a "):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_truncated_tokenizer_is_refused(models, tmp_path, kind):
    content = models[kind].read_bytes()
    path = tmp_path / models[kind].name
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        (b"{", b"", "vocab.json: holds broken JSON"),
        (b"[1]", b"", "not a map from tokens to distinct ids"),
        (b'{"a": 0, "b": 0}', b"", "not a map from tokens to distinct ids"),
        (b'{"a": 0}', b"#version: 0.2\na b c\n", "merges.txt:2: expected two tokens"),
        (b'{"a": 0}', b"\xff\xff", "byte 0 is not UTF-8"),
        (b'{"a": 0}', b"a b\n", "does not fit vocab.json"),
        (b"{}", b"", "the vocabulary is empty"),
    ],
)
def test_broken_gpt2_files_are_named(tmp_path, vocabulary, merges, message):
    (tmp_path / "vocab.json").write_bytes(vocabulary)
    (tmp_path / "merges.txt").write_bytes(merges)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_half_a_gpt2_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"vocab\.json with merges.txt or encoder.json with vocab.bpe"):
        load_tokenizer(tmp_path, "gpt2")
    with pytest.raises(UserError, match="cannot tell what kind"):
        load_tokenizer(tmp_path)


def test_an_unknown_kind_is_refused(models):
    with pytest.raises(UserError, match="unknown tokenizer kind 'bert'"):
        load_tokenizer(models["huggingface"], "bert")  # type: ignore[arg-type]


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot read the tokenizer: it is a folder"):
        load_tokenizer(tmp_path)


# --- files of other kinds of tokenizers -------------------------------------------------------------------------------

TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\nJA== 3\n"
TEKKEN = {
    "config": {"pattern": "x", "num_vocab_tokens": 2, "version": "v3"},
    "vocab": [{"rank": 0, "token_bytes": "AA==", "token_str": None}],
    "special_tokens": [{"rank": 0, "token_str": "<unk>", "is_control": True}],
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("name", ["cl100k_base.tiktoken", "tokenizer.model", "tokenizer.json", "folder/qwen.tiktoken"])
def test_a_vocabulary_of_tiktoken_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / name).write_bytes(TIKTOKEN)
    for path in {tmp_path / name, (tmp_path / name).parent}:
        with pytest.raises(UserError) as caught:
            load_tokenizer(path)
        assert caught.value.where == str(tmp_path / name)
        assert (
            caught.value.problem.startswith("is a vocabulary of tiktoken") and "tokenizer.json" in caught.value.remedy
        )


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.json", "folder/tekken_240911.json"])
def test_a_vocabulary_of_tekken_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / name).write_text(json.dumps(TEKKEN))
    for path in {tmp_path / name, (tmp_path / name).parent}:
        with pytest.raises(UserError, match=r"is a vocabulary of tekken .*\n.*tokenizer\.json of the same model"):
            load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"])
def test_a_pointer_of_git_lfs_is_named(models, tmp_path, name):
    folder = write_gpt2(tmp_path / "gpt2", models["huggingface"])
    (folder / name).write_bytes(LFS)
    with pytest.raises(UserError, match=rf"{name}: is a pointer of git-LFS, not the file itself\n.*git lfs pull"):
        load_tokenizer(folder / name)


def test_other_files_given_for_a_tokenizer_are_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "model_max_length": 5}')
    with pytest.raises(UserError, match="holds settings of a tokenizer, not its vocabulary"):
        load_tokenizer(tmp_path / "tokenizer_config.json")
    for name in ("page.json", "page.model"):
        (tmp_path / name).write_text("<!DOCTYPE html><html></html>")
        with pytest.raises(UserError, match="not a tokenizer, but a web page"):
            load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"}),
        ("config.json", {"model_type": "qwen2"}),
    ],
)
def test_files_like_gpt2s_of_another_family_are_refused_unless_the_kind_is_named(models, tmp_path, name, content):
    """A folder as Qwen's, whose rule for cutting text into words stands in tokenizer.json alone."""
    folder = write_gpt2(tmp_path / "model", models["huggingface"])
    (folder / name).write_text(json.dumps(content))
    for path in (folder, folder / "vocab.json", folder / "merges.txt"):
        with pytest.raises(UserError, match=f"{name} names {next(iter(content.values()))}") as caught:
            load_tokenizer(path)
        assert "tokenizer.json" in caught.value.remedy
    assert load_tokenizer(folder, "gpt2").kind == "gpt2"
    shutil.copy(models["huggingface"], folder / "tokenizer.json")
    assert load_tokenizer(folder).kind == "huggingface"


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "GPT2TokenizerFast", "RobertaTokenizer", "PreTrainedTokenizerFast"])
def test_files_of_families_that_cut_like_gpt2_are_read(models, tmp_path, named):
    folder = write_gpt2(tmp_path / "model", models["huggingface"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    (folder / "config.json").write_text("broken")
    assert load_tokenizer(folder).kind == "gpt2"


@pytest.mark.parametrize("token", [";Ċ", ".ĊĊ", "fox</w>"])
def test_a_vocabulary_that_gpt2s_rule_never_gives_is_refused(models, tmp_path, token):
    """Nothing beside the files tells the family, but its tokens do."""
    folder = write_gpt2(tmp_path / "model", models["huggingface"])
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, token: len(vocabulary)}))
    with pytest.raises(UserError, match="which GPT-2's rule for cutting text into words never gives"):
        load_tokenizer(folder)


def test_a_text_that_cannot_be_encoded_has_an_error_of_its_own(tmp_path):
    tokenizer = word_level(["[UNK]", "</s>", "a"], ["</s>"])
    tokenizer.normalizer = tokenizers.normalizers.Replace("END", "</s>")
    loaded = load_tokenizer(write_json(tmp_path / "tokenizer.json", tokenizer))
    with pytest.raises(ControlTokenError):
        loaded.encode("a END")
    with pytest.raises(ControlTokenError):
        loaded.encode_batch(["a", "a END"])
