"""The indexed file, byte for byte against files packed by hand."""

from __future__ import annotations

import gc
import hashlib
import pickle
import subprocess
import sys
import tracemalloc
from itertools import chain
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest

from megachiar.data.storage import reader, writer
from megachiar.data.storage.index_format import dtype_for_vocabulary
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError


def build(prefix: Path, documents: list[list[list[float]]], dtype: str) -> IndexedDatasetBuilder:
    """Write documents through the builder, each in one call."""
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for document in documents:
            tokens = np.array([token for sequence in document for token in sequence], dtype)
            builder.add_sequences(tokens, [len(s) for s in document], [builder.sequences + len(document)])
    return builder


def read_bytes(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("dtype", sorted(oracle.CODES))
def test_builder_writes_and_reader_reads_every_type_byte_for_byte(tmp_path, dtype):
    rng = np.random.default_rng(oracle.CODES[dtype])
    for count in (1, 2, 40):
        documents = oracle.random_documents(rng, dtype, count)
        build(tmp_path / "ours", documents, dtype)
        assert read_bytes(tmp_path / "ours") == oracle.pack(documents, dtype)

        dataset = IndexedDataset(tmp_path / "ours")
        assert dataset.dtype == np.dtype(dtype)
        assert [s.tolist() for s in dataset] == [sequence for document in documents for sequence in document]
        assert [dataset.document(i).tolist() for i in range(dataset.documents)] == [list(chain(*d)) for d in documents]
        assert dataset.tokens.tolist() == [token for document in documents for s in document for token in s]


def test_index_longer_than_one_block_is_the_same(tmp_path, monkeypatch):
    documents = oracle.random_documents(np.random.default_rng(0), "uint16", 50)
    monkeypatch.setattr(writer, "INDEX_ROWS", 7)
    monkeypatch.setattr(reader, "INDEX_ROWS", 7)
    monkeypatch.setattr(writer, "WRITE_BUFFER", 64)
    build(tmp_path / "ours", documents, "uint16")
    assert read_bytes(tmp_path / "ours") == oracle.pack(documents, "uint16")
    IndexedDataset(tmp_path / "ours").check_index()


def test_one_by_one_and_many_at_once_are_the_same(tmp_path):
    documents = [[1, 2, 3], [4], [], [5, 6]]
    with IndexedDatasetBuilder(tmp_path / "one", "uint16") as builder:
        for document in documents:
            builder.add_document(document)
    with IndexedDatasetBuilder(tmp_path / "many", "uint16") as many:
        many.add_documents(np.array([1, 2, 3, 4, 5, 6]), [3, 1, 0, 2])
    assert (
        read_bytes(tmp_path / "one") == read_bytes(tmp_path / "many") == oracle.pack([[d] for d in documents], "uint16")
    )
    for each in (builder, many):
        assert (each.documents, each.sequences, each.tokens, each.largest_token_id) == (4, 4, 6, 6)


def test_checksums_are_those_of_the_files(tmp_path):
    builder = build(tmp_path / "a", oracle.random_documents(np.random.default_rng(1), "int32", 9), "int32")
    for key, content in zip(("bin", "idx"), read_bytes(tmp_path / "a"), strict=True):
        assert builder.checksums[key] == [hashlib.sha256(content).hexdigest()]


def test_type_follows_megatrons_rule_for_the_vocabulary():
    assert [dtype_for_vocabulary(size).name for size in (1, 65_499, 65_500, 200_000)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]
    with pytest.raises(ValueError, match="uint32"):
        IndexedDatasetBuilder("never", "uint32")


@pytest.mark.parametrize(
    ("dtype", "tokens", "named"),
    [
        ("uint16", [1, 70_000], "70000"),
        ("uint16", [-1, 5], "-1"),
        ("int32", [2**31], "2147483648"),
        ("int8", [200], "200"),
    ],
)
def test_an_id_that_does_not_fit_is_refused_and_nothing_is_left(tmp_path, dtype, tokens, named):
    with (
        pytest.raises(UserError, match=f"token id {named} does not fit {dtype}"),
        IndexedDatasetBuilder(tmp_path / "a", dtype) as builder,
    ):
        builder.add_document([1, 2, 3])
        builder.add_document(tokens)
    assert list(tmp_path.iterdir()) == []


def test_the_extremes_of_the_type_fit(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "a", "uint16") as builder:
        builder.add_document([0, 65_535])
    assert IndexedDataset(tmp_path / "a")[0].tolist() == [0, 65_535]


def test_floats_are_no_token_ids_and_lengths_must_sum_up(tmp_path):
    with pytest.raises(ValueError, match="whole numbers"), IndexedDatasetBuilder(tmp_path / "a", "uint16") as builder:
        builder.add_document(np.array([1.5]))
    with pytest.raises(ValueError, match="sum to 4"), IndexedDatasetBuilder(tmp_path / "a", "uint16") as builder:
        builder.add_documents([1, 2, 3], [1, 3])
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_without_tokens_is_refused(tmp_path):
    with (
        pytest.raises(UserError, match="no token was written"),
        IndexedDatasetBuilder(tmp_path / "a", "uint16") as builder,
    ):
        builder.add_document([])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_the_dataset_that_stood_there(tmp_path):
    build(tmp_path / "a", [[[1, 2]]], "uint16")
    oracle.make_manifest(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="halfway"), IndexedDatasetBuilder(tmp_path / "a", "uint16") as builder:
        builder.add_document([3])
        raise RuntimeError("halfway")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_rebuilt_under_the_same_name_are_read_anew_and_the_old_manifest_goes(tmp_path):
    build(tmp_path / "a", [[[1, 2]], [[3]]], "uint16")
    oracle.make_manifest(tmp_path / "a")
    old = IndexedDataset(tmp_path / "a")
    build(tmp_path / "a", [[[7]], [[8, 9]]], "uint16")
    assert [s.tolist() for s in IndexedDataset(tmp_path / "a")] == [[7], [8, 9]]
    assert [s.tolist() for s in old] == [[1, 2], [3]]  # the open map keeps the files it was opened on
    assert not (tmp_path / "a.json").exists()


def test_a_view_outlives_its_dataset(tmp_path):
    oracle.write(tmp_path / "a", [[list(range(5000))], [[1, 2, 3]]])
    script = (
        "import gc, sys; from megachiar.data.storage.reader import IndexedDataset\n"
        "views = [IndexedDataset(sys.argv[1])[i] for i in (0, 1)] + [IndexedDataset(sys.argv[1]).tokens]\n"
        "gc.collect(); print(*[int(view.sum()) for view in views])"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["12497500", "6", "12497506"])


def test_views_cannot_be_written_to(tmp_path):
    dataset = IndexedDataset(oracle.write(tmp_path / "a", [[[1, 2, 3]]]))
    for array in (dataset[0], dataset.tokens, dataset.lengths, dataset.document(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_places_outside_are_index_errors(tmp_path):
    dataset = IndexedDataset(oracle.write(tmp_path / "a", [[[1, 2], [3]], [[4]]]))
    assert dataset[-1].tolist() == [4]
    for ask in (lambda: dataset[3], lambda: dataset.document(2), lambda: dataset.document_of_token(4)):
        with pytest.raises(IndexError):
            ask()


def test_document_of_token_skips_empty_documents(tmp_path):
    documents = [[[1, 2]], [[]], [[], [3]], [[4, 5, 6], [7]]]
    dataset = IndexedDataset(oracle.write(tmp_path / "a", documents))
    assert [dataset.document_of_token(token) for token in range(7)] == [0, 0, 2, 3, 3, 3, 3]
    assert [dataset.token_of_document(number) for number in range(5)] == [0, 2, 2, 3, 7]


def test_a_pickled_dataset_opens_the_files_again(tmp_path):
    dataset = IndexedDataset(oracle.write(tmp_path / "a", [[[1, 2, 3]]]))
    assert pickle.loads(pickle.dumps(dataset))[0].tolist() == [1, 2, 3]
    assert len(pickle.dumps(dataset)) < 1000


def kernel_flags(path: Path) -> list[str]:
    """What the kernel knows of this process's map of ``path``."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{path} is not mapped")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks the Linux kernel")
def test_random_access_is_told_to_the_kernel_and_survives_pickling(tmp_path):
    for random_access in (False, True):
        prefix = oracle.write(tmp_path / str(random_access), [[[7] * 1_000]])
        dataset = IndexedDataset(prefix, random_access=random_access)
        assert ("rr" in kernel_flags(tmp_path / f"{random_access}.bin")) == random_access
        copy = pickle.loads(pickle.dumps(dataset))
        del dataset
        gc.collect()
        assert ("rr" in kernel_flags(tmp_path / f"{random_access}.bin")) == random_access
        assert copy.tokens[500] == 7


def test_announcing_any_part_changes_nothing(tmp_path):
    dataset = IndexedDataset(oracle.write(tmp_path / "a", [[list(range(9_000))]]), random_access=True)
    for token, length in ((0, 1), (0, 9_000), (5_000, 10), (8_999, 1), (8_990, 500)):
        dataset.prefetch_hint(token, length)
    assert dataset[0].tolist() == list(range(9_000))


def test_a_prefix_may_hold_dots_and_its_folder_is_made(tmp_path):
    build(tmp_path / "new" / "v1.5", [[[1]]], "uint16")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["v1.5.bin", "v1.5.idx"]


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    def peak(documents: int) -> int:
        gc.collect()
        tracemalloc.start()
        with IndexedDatasetBuilder(tmp_path / "a", "uint16") as builder:
            for _ in range(documents // 10_000):
                builder.add_documents(np.ones(30_000, np.uint16), np.full(10_000, 3))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(3_000_000) < 1.2 * peak(600_000)
