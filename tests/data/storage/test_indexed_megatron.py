"""megatron-core reads our files to the same tokens, and we read what its builder writes.

Runs where ``megatron.core`` is importable: ``pip install --no-deps megatron-core`` (its datasets need only torch,
numpy and packaging). Its import takes seconds and changes global state, so that it stays in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest

from megachiar.data.preprocessing.merge import merge_datasets
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
    reason="megatron-core is not installed: pip install --no-deps megatron-core",
)
DTYPES = sorted(oracle.CODES)

PEER = """
import json, sys
import numpy as np, torch
from pathlib import Path
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
folder = Path(sys.argv[1])
tokens = {}
for index in sorted(folder.glob("ours-*.idx")):
    prefix = str(index.with_suffix(""))
    for mmap in (True, False):
        dataset = IndexedDataset(prefix, mmap=mmap)
        tokens[f"{index.stem} {mmap}"] = {
            "dtype": np.dtype(dataset.index.dtype).name,
            "sequences": [dataset[i].tolist() for i in range(len(dataset))],
            "document_indices": dataset.document_indices.tolist(),
        }
(folder / "read.json").write_text(json.dumps(tokens))
for wanted in sorted(folder.glob("theirs-*.json")):
    dtype = wanted.stem.split("-")[1]
    builder = IndexedDatasetBuilder(str(wanted.with_suffix(".bin")), dtype=np.dtype(dtype).type)
    for document in json.loads(wanted.read_text()):
        flat = [token for sequence in document for token in sequence]
        builder.add_document(np.array(flat, dtype), [len(sequence) for sequence in document])
    builder.finalize(str(wanted.with_suffix(".idx")))
    wanted.unlink()
joined = IndexedDatasetBuilder(str(folder / "joined.bin"), dtype=np.uint16)
for part in ("ours-uint16", "theirs-uint16"):
    joined.add_index(str(folder / part))
joined.finalize(str(folder / "joined.idx"))
"""


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> tuple[Path, dict[str, list]]:
    """A folder where both sides have written a dataset of each type and megatron-core has read ours."""
    folder = tmp_path_factory.mktemp("exchange")
    documents = {d: oracle.random_documents(np.random.default_rng(oracle.CODES[d]), d, 30) for d in DTYPES}
    for dtype in DTYPES:
        with IndexedDatasetBuilder(folder / f"ours-{dtype}", dtype) as builder:
            for document in documents[dtype]:
                flat = np.array(list(chain(*document)), dtype)
                builder.add_sequences(flat, [len(s) for s in document], [builder.sequences + len(document)])
        (folder / f"theirs-{dtype}.json").write_text(json.dumps(documents[dtype]))
    done = subprocess.run([sys.executable, "-c", PEER, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, {**documents, "read": json.loads((folder / "read.json").read_text())}


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_core_reads_ours(exchanged, dtype):
    _, documents = exchanged
    for mmap in (True, False):
        read = documents["read"][f"ours-{dtype} {mmap}"]
        assert read["dtype"] == dtype
        assert read["sequences"] == list(chain(*documents[dtype]))
        assert read["document_indices"] == [0, *np.cumsum([len(document) for document in documents[dtype]]).tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_megatron_core_writes(exchanged, dtype):
    folder, documents = exchanged
    dataset = IndexedDataset(folder / f"theirs-{dtype}")
    assert dataset.dtype == np.dtype(dtype)
    assert [s.tolist() for s in dataset] == list(chain(*documents[dtype]))
    assert [dataset.document(n).tolist() for n in range(dataset.documents)] == [
        list(chain(*d)) for d in documents[dtype]
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_write_the_same_bytes(exchanged, dtype):
    folder, _ = exchanged
    for suffix in ("bin", "idx"):
        ours, theirs = (folder / f"{side}-{dtype}.{suffix}" for side in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_both_merge_to_the_same_bytes(exchanged, tmp_path):
    folder, _ = exchanged
    inputs = [folder / "ours-uint16", folder / "theirs-uint16"]
    assert merge_datasets(inputs, tmp_path / "joined", allow_missing_manifest=True) is None
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"joined.{suffix}").read_bytes() == (folder / f"joined.{suffix}").read_bytes()
