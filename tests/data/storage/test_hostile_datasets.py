"""Whatever happens to a file of a dataset, it is read as it was written, or answered with one clear error."""

from __future__ import annotations

import io
import json
from pathlib import Path

import indexed_oracle as oracle
import pytest
from hostile import (
    EXAMPLES,
    IN_PLACE,
    for_each_damage,
    fresh_folder,
    put_in_place,
    refused,
    unsealed,
    with_hostile_values,
)
from text_helpers import numbered_documents, train, write_jsonl

from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.sampling.dataset import TokenSource, ValidationSet, build_training_samples
from megachiar.data.sampling.inspection import find_tokenizer, show_document, summarise
from megachiar.data.sampling.verification import blocks_of, find_altered
from megachiar.data.storage.reader import IndexedDataset

pytestmark = pytest.mark.timeout(60)
FILES = ("a.bin", "a.idx", "a.json")
VOCABULARY = 400


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Two datasets of one tokenizer: their files, by name."""
    folder = tmp_path_factory.mktemp("written")
    model = train(folder, "sentencepiece")
    datasets = {}
    for name, documents in {"one": numbered_documents(20), "other": numbered_documents(50)[20:]}.items():
        sources = find_sources([write_jsonl(folder / f"{name}.jsonl", documents)])
        preprocess(PreprocessSettings(sources, model, folder / name / "a", append_eod=True), io.StringIO())
        files = {file: (folder / name / file).read_bytes() for file in FILES}
        datasets[name] = {**files, model.name: model.read_bytes()}
    return datasets


def read_all(prefix: Path, verify: bool = False) -> str:
    """Return all that a run and the commands read of a dataset, with what its manifest says."""
    summary = summarise(prefix, verify=verify)
    del summary["verified"]
    tokenizer = find_tokenizer(prefix, None)
    text = show_document(prefix, summary["documents"] - 1, tokenizer)
    samples = build_training_samples([(prefix, 1.0)], 16, 3, vocab_size=VOCABULARY)
    validation = ValidationSet(prefix, 16, vocab_size=VOCABULARY)
    windows = [part.tolist() for part in validation.batch(0, validation.windows)]
    documents = [samples.documents(position) for position in range(20)]
    batch = samples.batch(range(20)).tolist()
    counts = {key: summary[key] for key in ("documents", "tokens", "manifest", "document_tokens")}
    manifest = samples.sources[0].manifest
    contents = manifest and (manifest.content, manifest.fingerprint)
    return repr([counts, contents, text, documents, batch, windows, validation.words, validation.text_bytes])


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_and_named(written, tmp_path, name, what):
    folder = fresh_folder(tmp_path / "a", written["one"])
    put_in_place(folder / name, what)
    error = refused(lambda: read_all(folder / "a"))
    assert error is not None and error.where == str(folder / name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_dataset_is_refused(written, tmp_path, name):
    folder = fresh_folder(tmp_path / "a", {**written["one"], name: written["other"][name]})
    assert refused(lambda: read_all(folder / "a")) is not None


@EXAMPLES
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_changes_nothing(written, tmp_path, name, examples):
    """Tokens that were altered are told by verifying alone: see the next test."""
    expected = read_all(fresh_folder(tmp_path / "a", written["one"]) / "a", verify=True)

    def check(damaged: bytes) -> None:
        folder = fresh_folder(tmp_path / "a", {**written["one"], name: damaged})
        if refused(lambda: read_all(folder / "a", verify=True)) is None:
            assert read_all(folder / "a") == expected

    for_each_damage(written["one"][name], check, examples)


@EXAMPLES
def test_altered_tokens_are_found_by_verifying(written, tmp_path, examples):
    content = written["one"]["a.bin"]

    def check(damaged: bytes) -> None:
        folder = fresh_folder(tmp_path / "a", {**written["one"], "a.bin": damaged})
        if damaged == content or len(damaged) != len(content):
            return
        found = find_altered(blocks_of([TokenSource(folder / "a")]))
        assert found is not None and found.where == str(folder / "a.bin")

    for_each_damage(content, check, examples)


def test_any_value_of_a_manifest_is_read_or_refused(written, tmp_path):
    """These manifests have no seal, as those of earlier versions and of people who edit them."""
    folder = fresh_folder(tmp_path / "a", written["one"])
    for record in with_hostile_values(unsealed(written["one"]["a.json"])):
        (folder / "a.json").write_text(json.dumps(record))
        refused(lambda: read_all(folder / "a"))


def test_a_manifest_that_was_edited_is_refused_until_its_seal_is_taken_out(written, tmp_path):
    record = json.loads(written["one"]["a.json"])
    folder = fresh_folder(tmp_path / "a", written["one"])
    record["text_bytes"] += 1
    (folder / "a.json").write_text(json.dumps(record))
    error = refused(lambda: ValidationSet(folder / "a", 16))
    assert error is not None and "its seal does not fit its content" in error.problem
    del record["seal"]
    (folder / "a.json").write_text(json.dumps(record))
    assert ValidationSet(folder / "a", 16).text_bytes == record["text_bytes"]


@pytest.mark.parametrize("count", [0, 2])
def test_a_manifest_has_a_checksum_of_every_block(written, tmp_path, count):
    record = unsealed(written["one"]["a.json"])
    record["checksums"]["bin"] *= count
    folder = fresh_folder(tmp_path / "a", {**written["one"], "a.json": json.dumps(record).encode()})
    error = refused(lambda: TokenSource(folder / "a"))
    assert error is not None and f"records {count} checksums of a.bin" in error.problem


def test_every_bit_of_an_index_matters(tmp_path):
    """Where documents begin is all that no other number tells: only checksums do."""
    documents = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 10]], [[1], [2], [3]]]
    sequences = [sequence for document in documents for sequence in document]
    prefix = oracle.write(tmp_path / "a", documents)
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    inner_starts = range(len(content) - 8 * len(documents), len(content) - 8)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if refused(lambda: IndexedDataset(prefix)) is None:
            dataset = IndexedDataset(prefix)
            assert bit // 8 in inner_starts
            assert [dataset[number].tolist() for number in range(len(dataset))] == sequences
