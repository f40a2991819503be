"""Tokenizers by their names on the hub: fetched, cached, pinned and recorded, from a stand-in on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from local_hub import COMMIT, OTHER_COMMIT, Hub, serve_hub, write_hub_cache
from text_helpers import DOCUMENTS, run_tool, train, write_jsonl

from megachiar.data.storage.manifest import read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.tokenizers.hub import hub_origin, local_tokenizer
from megachiar.data.tokenizers.recorded import find_recorded, keep_tokenizer, read_kept_record
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError

NAME = "acme/bpe"
SETTINGS = b'{"eos_token": "<|endoftext|>", "model_max_length": 1024}'


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> bytes:
    return train(tmp_path_factory.mktemp("hub_tokenizer"), "huggingface").read_bytes()


@pytest.fixture
def hub(vocabulary) -> Iterator[Hub]:
    with serve_hub() as hub:
        hub.add(NAME, {"tokenizer.json": vocabulary, "tokenizer_config.json": SETTINGS, "model.safetensors": b"large"})
        yield hub


def preprocess(folder: Path, name: str, *arguments: object, url: str):
    source = folder / "in.jsonl"
    if not source.exists():
        write_jsonl(source, DOCUMENTS)
    return run_tool(
        "preprocess_data",
        *("--input", source, "--tokenizer", name, "--output-prefix", folder / "out", "--workers", 1, *arguments),
        env={"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf")},
    )


def expected(vocabulary: bytes) -> list[list[int]]:
    """The ids of the documents as the library gives them, control strings as text."""
    library = tokenizers.Tokenizer.from_str(vocabulary.decode())
    library.encode_special_tokens = True
    return [library.encode(text).ids for text in DOCUMENTS]


def test_a_name_is_fetched_once_pinned_and_recorded(tmp_path, hub, vocabulary):
    done = preprocess(tmp_path, f"hf:{NAME}", "--append-eod", url=hub.url)
    assert done.returncode == 0, done.stderr
    assert "ends with '<|endoftext|>' (id 0, eos_token of tokenizer_config.json)" in done.stderr
    dataset, manifest = IndexedDataset(tmp_path / "out"), read_manifest(tmp_path / "out")
    assert [dataset[n].tolist() for n in range(len(dataset))] == [[*ids, 0] for ids in expected(vocabulary)]
    assert manifest.tokenizer.hub == f"hf:{NAME}@{COMMIT}" and manifest.tokenizer.eod_id == 0
    assert not any("safetensors" in path for path in hub.asked)

    asked = len(hub.asked)
    assert "nothing was done" in preprocess(tmp_path, f"hf:{NAME}", "--append-eod", url=hub.url).stderr
    assert not any("/resolve/" in path for path in hub.asked[asked:])
    shown = run_tool("inspect_dataset", tmp_path / "out", "--document", 0, env={"HF_HOME": str(tmp_path / "hf")})
    assert shown.stdout.endswith(f"{DOCUMENTS[0]}\n"), shown.stderr


def test_the_cache_serves_where_there_is_no_network(tmp_path, hub):
    assert preprocess(tmp_path, f"hf:{NAME}", url=hub.url).returncode == 0
    nowhere = "http://127.0.0.1:9"
    for name in (f"hf:{NAME}", f"hf:{NAME}@main", f"hf:{NAME}@{COMMIT}"):
        done = preprocess(tmp_path, name, url=nowhere)
        assert done.returncode == 0 and "nothing was done" in done.stderr, done.stderr
    done = preprocess(tmp_path, "hf:acme/other", url=nowhere)
    assert done.returncode == 2 and "hf:acme/other: cannot be fetched, and is not in the cache" in done.stderr
    assert "HF_HUB_CACHE" in done.stderr and "Traceback" not in done.stderr


def test_a_revision_is_what_is_used(tmp_path, hub, vocabulary):
    """After the branch moved to another vocabulary, the old commit still gives the old one."""
    moved = json.loads(vocabulary)
    moved["normalizer"] = {"type": "Lowercase"}
    hub.add(NAME, {"tokenizer.json": json.dumps(moved).encode()}, OTHER_COMMIT)
    assert preprocess(tmp_path, f"hf:{NAME}@{COMMIT}", url=hub.url).returncode == 0
    assert read_manifest(tmp_path / "out").tokenizer.hub == f"hf:{NAME}@{COMMIT}"
    done = preprocess(tmp_path, f"hf:{NAME}", url=hub.url)
    assert done.returncode == 2 and "it was made with tokenizer" in done.stderr
    assert preprocess(tmp_path, f"hf:{NAME}", "--overwrite", url=hub.url).returncode == 0
    assert read_manifest(tmp_path / "out").tokenizer.hub == f"hf:{NAME}@{OTHER_COMMIT}"


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("hf:acme/none", "the hub has no repository 'acme/none'", "check the name"),
        (f"hf:{NAME}@v9", f"the repository '{NAME}' has no revision 'v9'", "a branch, a tag or a whole commit"),
        (f"hf:{NAME}@", "is no name on the hub", "hf:OWNER/NAME@REVISION"),
        ("hf:../x", "is no name on the hub", "hf:OWNER/NAME"),
        ("hf:acme/empty", "holds no tokenizer: none of tokenizer.json", "name the repository of a tokenizer"),
        (NAME, "there is no such tokenizer file or folder", f"write hf:{NAME}, which fetches it"),
    ],
)
def test_a_name_that_gives_no_tokenizer_is_one_clear_error(tmp_path, hub, name, problem, remedy):
    hub.add("acme/empty", {"config.json": b"{}"})
    done = preprocess(tmp_path, name, url=hub.url)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {name}: {problem}" in done.stderr and remedy in done.stderr
    assert not (tmp_path / "out.bin").exists()


def test_where_a_cached_file_came_from(tmp_path, vocabulary):
    folder = write_hub_cache(tmp_path / "cache", "owner/a-b--c", {"tokenizer.json": vocabulary})
    for path in (folder, folder / "tokenizer.json"):
        assert hub_origin(path) == f"hf:owner/a-b--c@{COMMIT}"
        assert local_tokenizer(path) == path
    shutil.copytree(folder, tmp_path / "plain")
    assert hub_origin(tmp_path / "plain" / "tokenizer.json") is None


def test_a_run_keeps_a_copy_with_its_own_name(tmp_path, vocabulary):
    """The cache links files to blobs without suffixes: the copy has the file's name, and the record the commit."""
    folder = write_hub_cache(
        tmp_path / "cache", NAME, {"tokenizer.json": vocabulary, "tokenizer_config.json": SETTINGS}
    )
    keep_tokenizer(load_tokenizer(folder, prepend_bos=True), tmp_path / "run")
    record = read_kept_record(tmp_path / "run")
    assert record.file == "tokenizer/tokenizer.json" and record.hub == f"hf:{NAME}@{COMMIT}" and record.bos_id == 0
    assert (tmp_path / "run" / record.file).read_bytes() == vocabulary


def test_a_dataset_finds_its_tokenizer_in_the_cache_of_another_machine(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "there"))
    here = write_hub_cache(tmp_path / "here", NAME, {"tokenizer.json": vocabulary})
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    done = run_tool("preprocess_data", "--input", source, "--tokenizer", here, "--output-prefix", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (tmp_path / "here").rename(tmp_path / "moved")
    manifest = read_manifest(tmp_path / "out")
    assert find_recorded(tmp_path / "out", manifest) is None
    there = write_hub_cache(tmp_path / "there", NAME, {"tokenizer.json": vocabulary})
    assert find_recorded(tmp_path / "out", manifest) == there


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (b'{"eos_token": "<eos>"}', "'<eos>' (eos_token of tokenizer_config.json) is not in the vocabulary"),
        (b'{"eos_token": 7}', "eos_token is 7, not a token"),
        (b'{"eos_token": {"content": null}}', "eos_token is {'content': None}, not a token"),
        (b'{"eos_token": ', "holds broken JSON"),
        (b"[]", "is no JSON object"),
    ],
)
def test_settings_that_name_no_token_are_refused(tmp_path, vocabulary, settings, problem):
    (tmp_path / "tokenizer.json").write_bytes(vocabulary)
    (tmp_path / "tokenizer_config.json").write_bytes(settings)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert problem in str(caught.value) and caught.value.remedy
    if b"eos_token" in settings and b"}" in settings:
        assert load_tokenizer(tmp_path, eod_token="<|endoftext|>").eod_id == 0


@pytest.mark.parametrize("value", ["Ġthe", {"content": "Ġthe", "lstrip": False}])
def test_the_settings_beside_a_vocabulary_name_the_edges(tmp_path, vocabulary, value):
    """The token is another one than the vocabulary's own, and ordinary text no longer becomes it."""
    library = tokenizers.Tokenizer.from_str(vocabulary.decode())
    index = library.token_to_id("Ġthe")
    (tmp_path / "tokenizer.json").write_bytes(vocabulary)
    assert load_tokenizer(tmp_path).eod_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value, "bos_token": value}))
    tokenizer = load_tokenizer(tmp_path, prepend_bos=True)
    assert (tokenizer.eod_id, tokenizer.bos_id) == (index, index)
    assert load_tokenizer(tmp_path).bos_id is None
    assert load_tokenizer(tmp_path, prepend_bos=True, bos_token="<|endoftext|>", eod_token=5).bos_id == 0
