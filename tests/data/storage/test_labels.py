"""Labels of a dataset: written and read as numpy does, checked as the other files of a dataset are."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest
from hostile import EXAMPLES, IN_PLACE, for_each_damage, put_in_place, refused, unsealed, with_hostile_values

from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.sampling.inspection import summarise
from megachiar.data.sampling.verification import blocks_of, find_altered
from megachiar.data.storage.files import labels_path, manifest_path, remove_dataset, temporary_path
from megachiar.data.storage.files import put_in_place as place_files
from megachiar.data.storage.labels import read_labels, refuse_empty_examples, write_labels
from megachiar.data.storage.manifest import LabelsRecord, check_manifest, read_manifest, write_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python
CLASSES = ("neg", "pos", "mixed")
NUMBERS = [1, 0, 1, 2]


@pytest.fixture
def prefix(tmp_path) -> Path:
    """A labelled dataset of four documents."""
    prefix = oracle.write(tmp_path / "a", [[[1, 2, 3]], [[4, 299]], [[7]], [[8, 9]]])
    oracle.make_manifest(prefix)
    write_labels(prefix, NUMBERS, CLASSES)
    return prefix


def read(prefix: Path):
    return read_labels(prefix, read_manifest(prefix), IndexedDataset(prefix).documents)


def test_labels_come_back_as_they_were_written(prefix):
    labels = read(prefix)
    assert labels.classes == CLASSES and labels.numbers.tolist() == NUMBERS and labels.numbers.dtype == np.int32
    assert labels.counts() == {"neg": 1, "pos": 2, "mixed": 1}
    with pytest.raises(ValueError, match="read-only"):
        labels.numbers[0] = 0
    check_manifest(prefix, read_manifest(prefix), verify=True)


def test_the_file_is_numpys_own_in_both_directions(prefix, tmp_path):
    found = np.load(labels_path(prefix), allow_pickle=False)
    assert found.dtype == np.int32 and found.tolist() == NUMBERS
    np.save(tmp_path / "by_numpy.npy", np.array(NUMBERS, np.int32))
    assert (tmp_path / "by_numpy.npy").read_bytes() == labels_path(prefix).read_bytes()


def test_a_manifest_without_labels_is_as_it_was_before_there_were_any(tmp_path):
    prefix = oracle.write(tmp_path / "b", [[[1, 2]]])
    manifest = oracle.make_manifest(prefix)
    assert "labels" not in json.loads(manifest_path(prefix).read_text())
    assert read_manifest(prefix) == manifest and manifest.labels is None
    error = refused(lambda: read(prefix))
    assert error is not None and "has no labels" in error.problem and "--label-key" in error.remedy


def test_a_dataset_without_manifest_has_no_labels(tmp_path):
    prefix = oracle.write(tmp_path / "b", [[[1, 2]]])
    error = refused(lambda: read_labels(prefix, None, 1))
    assert error is not None and "has no manifest" in error.problem
    error = refused(lambda: write_labels(prefix, [0], ["one"]))
    assert error is not None and "there is no manifest" in error.problem


def test_labels_count_in_what_tells_datasets_apart(prefix):
    before = read_manifest(prefix)
    write_labels(prefix, [0, 0, 1, 2], CLASSES)
    after = read_manifest(prefix)
    assert before.checksums == after.checksums
    assert before.fingerprint != after.fingerprint and before.content != after.content


@pytest.mark.parametrize("use", ["check", "open", "inspect", "read"])
def test_a_labelled_dataset_without_its_labels_is_refused(prefix, use):
    labels_path(prefix).unlink()
    uses = {
        "check": lambda: check_manifest(prefix, read_manifest(prefix)),
        "open": lambda: TokenSource(prefix),
        "inspect": lambda: summarise(prefix),
        "read": lambda: read(prefix),
    }
    error = refused(uses[use])
    assert error is not None and error.where == str(labels_path(prefix))
    assert "does not exist, but the manifest" in error.problem and ".labels.npy" in error.remedy


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.timeout(60)
def test_what_is_no_file_of_labels_is_refused_and_named(prefix, what):
    put_in_place(labels_path(prefix), what)
    for use in (lambda: TokenSource(prefix), lambda: summarise(prefix, verify=True), lambda: read(prefix)):
        error = refused(use)
        assert error is not None and error.where == str(labels_path(prefix))


def npy(descr: str, shape: str, body: bytes, version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (npy("'<i8'", "(2,)", bytes(16)), r"holds <i8 of shape \(2,\) in 144 bytes, not int32"),
        (npy("'>i4'", "(4,)", bytes(16)), r"holds >i4 of shape \(4,\)"),
        (npy("'<f4'", "(4,)", bytes(16)), "holds <f4"),
        (npy("'<i4'", "(2, 2)", bytes(16)), r"holds <i4 of shape \(2, 2\)"),
        (npy("'<i4'", "(999999999999999999,)", bytes(16)), r"shape \(999999999999999999,\)"),
        (npy("'|O'", "(4,)", b"cos\nsystem\n(S''\n"), r"holds \|O of shape"),
        (npy("'<i4'", "(4,)", bytes(16), version=b"\x03\x00"), r"holds <i4 of shape \(4,\)"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 134, "is no file of numpy's version 1.0"),
        (b"PK\x03\x04" + bytes(140), "begins with b'PK"),
        (npy("'<i4'", "(4,)", bytes(12)), "has 140 bytes, but the labels of 4 documents take 144"),
        (npy("'<i4'", "(4,)", bytes(20)), "has 148 bytes"),
    ],
)
def test_another_array_is_refused_in_one_message(prefix, content, problem):
    """Each has checksums that fit, as a dataset made by hand would."""
    labels_path(prefix).write_bytes(content)
    oracle.make_manifest(prefix, labels=LabelsRecord(classes=list(CLASSES), checksums=oracle.checksums_of(content)))
    with pytest.raises(UserError, match=problem) as caught:
        read(prefix)
    assert caught.value.where == str(labels_path(prefix))


@pytest.mark.parametrize("number", [3, -1, 2**31 - 1])
def test_a_number_that_is_no_class_is_refused_with_its_document(prefix, number):
    content = npy("'<i4'", "(4,)", np.array([0, 1, number, 9], "<i4").tobytes())
    labels_path(prefix).write_bytes(content)
    oracle.make_manifest(prefix, labels=LabelsRecord(classes=list(CLASSES), checksums=oracle.checksums_of(content)))
    with pytest.raises(UserError, match=f"document 2 has class number {number}, but classes are 0 to 2"):
        read(prefix)


def test_every_flipped_bit_is_refused(prefix):
    content = labels_path(prefix).read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        labels_path(prefix).write_bytes(damaged)
        assert refused(lambda: read(prefix)) is not None
        if bit % 32:
            continue
        found = find_altered(blocks_of([TokenSource(prefix)]))
        assert found is not None and found.where == str(labels_path(prefix))
    with pytest.raises(UserError, match=r"a\.labels\.npy: bytes 0 to"):
        check_manifest(prefix, read_manifest(prefix), verify=True)


@EXAMPLES
def test_damage_is_refused_or_changes_nothing(prefix, examples):
    content = labels_path(prefix).read_bytes()

    def check(damaged: bytes) -> None:
        labels_path(prefix).write_bytes(damaged)
        if refused(lambda: read(prefix)) is None:
            assert damaged == content

    for_each_damage(content, check, examples)


def test_any_value_of_the_record_is_read_or_refused(prefix):
    for record in with_hostile_values(unsealed(manifest_path(prefix).read_bytes())):
        manifest_path(prefix).write_text(json.dumps(record))
        refused(lambda: read(prefix))


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        ([], "there is no class"),
        (["a", "a", "b"], "the class name 'a' occurs twice"),
        (["a", " ", "b"], "the class name ' ' is empty"),
        (["a", "b\n", "c"], "cannot be printed"),
    ],
)
def test_names_of_classes_are_checked(prefix, classes, problem):
    before = labels_path(prefix).read_bytes()
    error = refused(lambda: write_labels(prefix, NUMBERS, classes))
    assert error is not None and problem in error.problem
    record = unsealed(manifest_path(prefix).read_bytes())
    record["labels"]["classes"] = classes
    manifest_path(prefix).write_text(json.dumps(record))
    error = refused(lambda: read_manifest(prefix))
    assert error is not None and problem in error.problem
    assert labels_path(prefix).read_bytes() == before


@pytest.mark.parametrize("numbers", [[0, 1, 2], [[0, 1, 2, 0]], [0.0, 1.0, 2.0, 0.0], ["a", "b", "c", "d"]])
def test_labels_of_another_shape_or_type_are_not_written(prefix, numbers):
    error = refused(lambda: write_labels(prefix, numbers, CLASSES))
    assert error is not None and "for 4 documents" in error.problem
    assert read(prefix).numbers.tolist() == NUMBERS


def test_an_example_without_tokens_is_refused(tmp_path):
    prefix = oracle.write(tmp_path / "b", [[[1, 2]], [[]], [[3]]])
    oracle.make_manifest(prefix)
    with pytest.raises(UserError, match="document 1 has a label and no token"):
        refuse_empty_examples(IndexedDataset(prefix))
    error = refused(lambda: write_labels(prefix, [0, 1, 0], ["a", "b"]))
    assert error is not None and not labels_path(prefix).exists()
    refuse_empty_examples(IndexedDataset(oracle.write(tmp_path / "c", [[[], [2]], [[3]]])))


def test_files_of_two_datasets_are_never_joined(prefix):
    """A dataset without labels takes the place of a labelled one, whose labels go with it."""
    other = oracle.write(prefix.parent / "other", [[[5, 6]]])
    oracle.make_manifest(other)
    for suffix in (".bin", ".idx", ".json"):
        temporary_path(Path(f"{prefix}{suffix}")).write_bytes(Path(f"{other}{suffix}").read_bytes())
    place_files(prefix)
    assert not labels_path(prefix).exists() and IndexedDataset(prefix).documents == 1
    TokenSource(prefix)


def test_removing_a_dataset_removes_its_labels(prefix):
    remove_dataset(prefix)
    assert list(prefix.parent.iterdir()) == []


def test_a_record_survives_json(prefix):
    manifest = read_manifest(prefix)
    assert asdict(manifest)["labels"]["classes"] == list(CLASSES)
    write_manifest(prefix, manifest)
    assert read_manifest(prefix) == manifest
