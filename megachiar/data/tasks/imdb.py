"""Read the IMDB reviews (Maas et al. 2011): 25,000 to train and 25,000 to test, negative or positive.

They come from Hugging Face ``datasets``, from the folder ``aclImdb`` of the original archive, or from tables
``train.tsv`` and ``test.tsv`` with the columns ``label`` and ``text``. The original has no validation set. A tenth of
the training reviews, by the hash of their text, is ``valid``, so that no test review chooses anything. (The Long Range
Arena validates on the test set.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megachiar.data.inputs.documents import InvalidDocument, InvalidDocumentLog
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.tasks.tables import Table, check_folder, filled, find_file, need_columns, read_table
from megachiar.data.tasks.task_corpus import Example, part_of
from megachiar.errors import UserError, disk_errors

HUB_NAME = "stanfordnlp/imdb"
CLASSES = ("neg", "pos")
TABLES = {part: (f"{part}.tsv", f"{part}.csv") for part in ("train", "valid", "test")}
_REVIEW = re.compile(r"(\d+)_(\d+)\.txt")


def imdb_from_hub() -> Iterator[Example]:
    """Yield the reviews of Hugging Face ``datasets``, each with ``text`` and ``label``.

    Raises:
        UserError: the package is not installed, or the hub cannot be reached.
    """
    where, remedy = "megachiar corpus imdb", "or give the folder of the original archive: --from aclImdb"
    try:
        from datasets import load_dataset
    except ImportError:
        how = f"pip install -c constraints.txt -e '.[hf]', {remedy}"
        raise UserError(where, "needs the package datasets", how) from None
    try:
        dataset = load_dataset(HUB_NAME)
    except Exception as error:  # the library raises whatever its transport does
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(where, f"cannot be fetched: {reason}", f"check the network, {remedy}") from error
    for split in ("train", "test"):
        for number, row in enumerate(dataset[split]):
            text = row["text"]
            part = part_of(text) if split == "train" else split
            yield part, {"text": text, "label": CLASSES[row["label"]], "id": f"{split}/{number}"}


def imdb_files(folder: Path) -> list[Path]:
    """Return the files in ``folder`` that hold reviews, in the order in which they are read.

    Raises:
        UserError: the folder holds neither the folders of the archive nor tables.
    """
    check_folder(folder)
    with disk_errors(folder, "read"):
        root = folder / "aclImdb" if (folder / "aclImdb").is_dir() else folder
        kinds = [root / split / label for split in ("train", "test") for label in CLASSES]
        if all(kind.is_dir() for kind in kinds):
            return [path for kind in kinds for path in sorted(kind.glob("*.txt"), key=_number_of)]
        tables = {part: path for part, names in TABLES.items() if (path := find_file(folder, names)) is not None}
    if "train" in tables and "test" in tables:
        return list(tables.values())
    missing = next((kind for kind in kinds if not kind.is_dir()), kinds[0])
    problem = f"holds neither the reviews of the archive (there is no {missing}) nor train.tsv and test.tsv"
    remedy = "unpack aclImdb_v1.tar.gz and give its folder aclImdb, or give a folder with both tables"
    raise UserError(f"--from {folder}", problem, remedy)


def imdb_from_files(files: list[Path], log: InvalidDocumentLog) -> Iterator[Example]:
    """Yield the reviews of ``imdb_files``; what cannot be read goes to ``log``.

    Raises:
        UserError: a file cannot be read, or ``log`` refuses a review.
    """
    if all(path.suffix == ".txt" for path in files):
        for path in files:
            yield from _review(path, log)
        return
    has_validation = any(path.stem == "valid" for path in files)
    for path in files:
        for where, row in read_table(path, Table(), log):
            need_columns(path, where, row, ("label", "text"))
            if filled(where, row, ("label", "text"), log):
                record: dict[str, Any] = {"text": row["text"], "label": row["label"].strip()}
                yield (part_of(row["text"]) if path.stem == "train" and not has_validation else path.stem), record


def _review(path: Path, log: InvalidDocumentLog) -> Iterator[Example]:
    """Yield the review of one file of the archive."""
    with disk_errors(path, "read"):
        content = read_regular(path)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        log.add(InvalidDocument("invalid_utf8", str(path), f"byte {error.start} is not valid UTF-8"))
        return
    if not text.strip():
        log.add(InvalidDocument("empty", str(path), "is empty"))
        return
    split, label = path.parts[-3:-1]
    part = part_of(text) if split == "train" else split
    yield part, {"text": text, "label": label, "id": f"{split}/{label}/{path.stem}"}


def _number_of(path: Path) -> tuple[int, str]:
    """Return the number in a review's name, by which reviews are sorted; other files come first, by name."""
    found = _REVIEW.fullmatch(path.name)
    return (int(found[1]) if found else -1, path.name)
