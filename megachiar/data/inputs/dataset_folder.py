"""Tell which files of a folder that the library ``datasets`` wrote with ``save_to_disk`` are its table.

    DIR/state.json dataset_info.json data-00000-of-00002.arrow ...    a dataset; state.json names the files of its table
    DIR/dataset_dict.json DIR/train/ DIR/test/ ...                    a dict of datasets, one for each split

Other Arrow files beside ``state.json`` are caches of earlier operations, which hold the same rows again. Two splits are
never joined: a corpus that holds the test set by accident is worth nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megachiar.data.inputs.folder_walk import LeftOut
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_json
from megachiar.errors import UserError, disk_errors

STATE, SPLITS = "state.json", "dataset_dict.json"
FILES_KEY, INDICES_KEYS = "_data_files", ("_indices_files", "_indices_data_files")
DESCRIPTION = "describes a dataset of the library `datasets`"
CACHE = "no file of the dataset's table: state.json does not name it"


def leave_out_descriptions(folder: Path, names: Sequence[str]) -> tuple[list[str], list[LeftOut]]:
    """Take the files that are no part of a table out of the files of ``folder``.

    Args:
        folder: where the files are.
        names: all files of the folder, by their paths in it.

    Returns:
        The other files, and the files left out.

    Raises:
        UserError: a dict of several splits is named as a whole, or a file of a table is missing.
    """
    left_out: dict[str, str] = {}
    for name in names:
        inside, _, last = name.rpartition("/")
        if last == SPLITS and (splits := _read(folder / name).get("splits")):
            _refuse_splits(folder / inside, splits)
            left_out[name] = DESCRIPTION
        if last == STATE and FILES_KEY in (state := _read(folder / name)):
            left_out |= _left_out_beside(folder, inside, names, state)
    kept = [name for name in names if name not in left_out]
    return kept, [LeftOut(name, left_out[name]) for name in names if name in left_out]


def _left_out_beside(folder: Path, inside: str, names: Sequence[str], state: dict[str, Any]) -> dict[str, str]:
    """Return the files beside a ``state.json`` that are no part of the table, with the reason."""
    beside = f"{inside}/" if inside else ""
    table = {f"{beside}{file['filename']}" for file in state[FILES_KEY]}
    if any(state.get(key) for key in INDICES_KEYS):
        problem = "is a selection of rows of other files, which its indices name"
        raise UserError(folder / inside, problem, "save it again: `dataset.flatten_indices().save_to_disk(OTHER)`")
    if missing := sorted(table - set(names)):
        problem = f"names {missing[0].rpartition('/')[2]}, which is missing"
        raise UserError(folder / beside / STATE, problem, "fetch the folder again, or write it again")
    mine = [name for name in names if name.startswith(beside) and "/" not in name[len(beside) :]]
    reasons = {name: CACHE for name in mine if name.endswith(".arrow") and name not in table}
    descriptions = {name: DESCRIPTION for name in mine if name[len(beside) :] in (STATE, "dataset_info.json")}
    return {**reasons, **descriptions}


def _refuse_splits(folder: Path, splits: Any) -> None:
    """Refuse a dict of more than one split."""
    if isinstance(splits, list) and len(splits) > 1:
        remedy = f"name the split: {folder}/{splits[0]}"
        raise UserError(folder, f"holds the splits {', '.join(map(str, splits))}, which are not joined", remedy)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing where it is no object, so that it is another program's."""
    with disk_errors(path, "read"):
        content = read_regular(path)
    try:
        found = parse_json(content)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    files = found.get(FILES_KEY, [])
    named = isinstance(files, list) and all(isinstance(file, dict) for file in files)
    return found if named and all(isinstance(file.get("filename"), str) for file in files) else {}
