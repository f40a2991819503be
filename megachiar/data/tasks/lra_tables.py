"""Read the tables of the Long Range Arena's release: its ListOps, and its pairs of papers for document retrieval.

    listops-1000/basic_{train,val,test}.tsv         columns Source and Target
    tsv_data/new_aan_pairs.{train,eval,test}.tsv    label, two ids and two texts, without a line of names

Retrieval asks whether one paper cites the other. The Arena encodes both by themselves and classifies their joined
vectors. Here one model reads one sequence: the first text, a separator, the second text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from megachiar.data.inputs.documents import InvalidDocumentLog
from megachiar.data.tasks.tables import Table, check_folder, filled, need_columns, read_table, whole_number
from megachiar.data.tasks.task_corpus import Example
from megachiar.errors import UserError

LISTOPS_FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
AAN_FILES = {
    part: f"new_aan_pairs.{name}.tsv" for part, name in (("train", "train"), ("valid", "eval"), ("test", "test"))
}
AAN_COLUMNS = ("label", "id1", "id2", "text1", "text2")
_PARENTHESES = str.maketrans("", "", "()")


def find_tables(folder: Path, names: Mapping[str, str], inner: str) -> dict[str, Path]:
    """Return the table of each part in ``folder``, or in its folder ``inner`` as the release has it.

    Raises:
        UserError: a table is missing.
    """
    check_folder(folder)
    folders = [folder, *(path for path in sorted(folder.rglob(inner)) if path.is_dir())]
    for candidate in folders:
        paths = {part: candidate / name for part, name in names.items()}
        if all(path.exists() for path in paths.values()):
            return paths
    missing = next(name for name in names.values() if not (folder / name).exists())
    remedy = f"give the folder with {', '.join(names.values())}, such as {inner} of lra_release"
    raise UserError(f"--from {folder}", f"holds no {missing}", remedy)


def listops_from_tables(tables: Mapping[str, Path], log: InvalidDocumentLog) -> Iterator[Example]:
    """Yield the expressions of the Arena's own files, without the parentheses that it drops too."""
    for part, path in tables.items():
        for where, row in read_table(path, Table(), log):
            need_columns(path, where, row, ("Source", "Target"))
            text = " ".join(row["Source"].translate(_PARENTHESES).split())
            label = whole_number(where, row["Target"], log)
            if label is not None and filled(where, {"Source": text}, ("Source",), log):
                yield part, {"text": text, "label": label}


def aan_from_tables(tables: Mapping[str, Path], log: InvalidDocumentLog) -> Iterator[Example]:
    """Yield the pairs of papers, each with ``text1``, ``text2``, ``label`` (1: one cites the other) and both ids."""
    for part, path in tables.items():
        for where, row in read_table(path, Table(AAN_COLUMNS, quoted=False), log):
            label = whole_number(where, row["label"], log)
            if label is not None and filled(where, row, ("text1", "text2"), log):
                yield part, {**row, "label": label}
