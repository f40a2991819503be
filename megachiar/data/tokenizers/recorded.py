"""Load the tokenizer that made a dataset as its manifest records it; a run folder keeps a copy with the same record.

    PREFIX.json                 "tokenizer": {kind, file, fingerprint, vocab_size, eod_id, bos_id, hub}
    RUN/tokenizer/              a copy of its files
    RUN/tokenizer_record.json   the same record; ``file`` is relative to RUN

``kind`` and ``eod_id`` follow from ``--tokenizer-kind`` and ``--eod-token`` when the dataset was made: neither is
guessed from the files again.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megachiar.data.storage.files import manifest_path, write_atomically
from megachiar.data.storage.identity import printable
from megachiar.data.storage.manifest import Manifest, TokenizerRecord
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_sealed, with_seal
from megachiar.data.tokenizers.hub import cached_tokenizer, hub_origin, local_tokenizer
from megachiar.data.tokenizers.ready_made import READY_MADE
from megachiar.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megachiar.data.tokenizers.vocabulary_files import tokenizer_fingerprint, vocabulary_files
from megachiar.errors import UserError, disk_errors

KEPT_FOLDER, KEPT_RECORD = "tokenizer", "tokenizer_record.json"


def describe_tokenizer(tokenizer: Tokenizer, folder: Path) -> TokenizerRecord:
    """Return the record of ``tokenizer`` for a file in ``folder``, relative to it where both may move together."""
    hub = hub_origin(tokenizer.path)
    file, folder = tokenizer.path.resolve() if hub is None else tokenizer.path.absolute(), folder.resolve()
    if tokenizer.kind == READY_MADE:
        file = tokenizer.path
    return TokenizerRecord(
        kind=tokenizer.kind,
        file=printable(file.relative_to(folder) if file.is_relative_to(folder) else file),
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        bos_id=tokenizer.bos_id,
        hub=hub,
    )


def load_as_recorded(path: Path, record: TokenizerRecord, where: Path) -> Tokenizer:
    """Load the tokenizer at ``path`` with the kind and the tokens at the edges of documents of ``record``.

    A record without an end-of-document token takes the tokenizer's own, if it has one.

    Args:
        path: a file or folder, or a name on the hub.
        record: of a manifest or a run folder.
        where: the file that holds the record, to be named in an error.

    Raises:
        UserError: there is no tokenizer at ``path``, or it is another one.
    """
    if record.kind == READY_MADE:
        raise UserError(where, f"no tokenizer made these ids, but {path} is given", "leave the tokenizer out")
    path = local_tokenizer(path)
    if not path.exists():
        return load_tokenizer(path)  # which says so
    made_with = f"made with the {record.kind} tokenizer {record.file} ({record.fingerprint})"
    remedy = "give the tokenizer the dataset was made with, or preprocess again"
    try:
        found = tokenizer_fingerprint(path, record.kind)
    except UserError as error:
        problem = f"{made_with}, but the one given is none: {error.where}: {error.problem}"
        raise UserError(where, problem, remedy) from None
    if found != record.fingerprint:
        raise UserError(where, f"{made_with}, but the one given has {found} ({path})", remedy)
    return load_tokenizer(
        path, record.kind, record.eod_id, prepend_bos=record.bos_id is not None, bos_token=record.bos_id
    )


def find_recorded(prefix: Path | str, manifest: Manifest) -> Path | None:
    """Return where the tokenizer of dataset ``prefix`` is: where the manifest says, or beside it; None if nowhere.

    One of the hub may also be in the hub's cache of this machine. It is not fetched here.
    """
    if manifest.tokenizer.kind == READY_MADE:
        return None
    folder, recorded = manifest_path(prefix).parent, Path(manifest.tokenizer.file)
    candidates = (folder / recorded, folder / recorded.name)  # an absolute path stays as it is
    found = next((path for path in candidates if os.path.exists(path)), None)  # unlike Path.exists, it takes any name
    hub = manifest.tokenizer.hub
    return cached_tokenizer(hub) if found is None and hub is not None else found


def manifest_of_tokenizer(datasets: Iterable[tuple[Path, Manifest | None]]) -> tuple[Path, Manifest] | None:
    """Return the dataset (prefix and manifest) whose manifest defines the tokenizer and the end-of-document token.

    It is the first that ends its documents with a token, since no other manifest knows which token was trained. Where
    none does, it is the first that has a manifest; None if none has.
    """
    known = [(prefix, manifest) for prefix, manifest in datasets if manifest is not None]
    return next(((prefix, manifest) for prefix, manifest in known if manifest.append_eod), known[0] if known else None)


def keep_tokenizer(tokenizer: Tokenizer, run: Path) -> None:
    """Copy the tokenizer's files and their record into the run folder, so that the run can be sampled from by itself.

    Raises:
        UserError: the disk is full or read-only.
    """
    source = tokenizer.path.resolve() if hub_origin(tokenizer.path) is None else tokenizer.path.absolute()
    kept = run / KEPT_FOLDER / printable(source.name)
    with disk_errors(kept):
        for file in vocabulary_files(source, tokenizer.kind):
            write_atomically(kept / file.name if source.is_dir() else kept, read_regular(file))
    _write_record(describe_tokenizer(tokenizer, source.parent), run)


def keep_record(record: TokenizerRecord, run: Path) -> None:
    """Write the record of a tokenizer whose files are missing, so that they can be put into the run folder later.

    A copy of the same tokenizer that the run folder has already stays known by its name.

    Raises:
        UserError: the disk is full or read-only.
    """
    kept = read_kept_record(run)
    if kept is None or kept.fingerprint != record.fingerprint:
        _write_record(record, run)


def _write_record(record: TokenizerRecord, run: Path) -> None:
    kept = replace(record, file=f"{KEPT_FOLDER}/{Path(record.file).name}")
    content = json.dumps(with_seal(kept.to_dict()), indent=2, ensure_ascii=False) + "\n"
    write_atomically(run / KEPT_RECORD, content.encode())


def read_kept_record(run: Path) -> TokenizerRecord | None:
    """Return the record of the tokenizer that the run folder keeps; None if it has none, as older run folders.

    Raises:
        UserError: the file cannot be read or is no such record.
    """
    path = run / KEPT_RECORD
    with disk_errors(path, "read"):
        try:
            content = read_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
    from pydantic import ValidationError

    try:
        record = _schema().validate_python(parse_sealed(content))
        if Path(record.file).is_absolute() or ".." in Path(record.file).parts:
            raise ValueError(f"file: {record.file!r} is no path inside the run folder")
        return record
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
    except ValueError as error:
        problems = str(error)
    raise UserError(path, f"is no record of a tokenizer: {problems}", "bring the file back from a copy") from None


@functools.cache
def _schema() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(TokenizerRecord)
