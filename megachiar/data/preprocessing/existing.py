"""Tell whether an output that exists is what a command would make, so that the same command can be given twice.

A dataset's manifest says what it was made of; a tokenizer or corpus has a note ``NAME.made`` beside it. As with
``make``, an input that was changed after the output was made counts as another input.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.storage.files import block_checksums, dataset_files, manifest_path, write_atomically
from megachiar.data.storage.manifest import Manifest, check_manifest, read_manifest
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.errors import UserError

SAME = "exists already and is what this command makes: nothing was done"


class OutputDiffers(Exception):
    """An output that exists is not whole, or is not what the command would make; the text says why."""


def find_existing(settings: PreprocessSettings, tokenizer: Tokenizer) -> dict[Path, Manifest]:
    """Return the manifest of each dataset that ``preprocess`` would make, where all of them exist already.

    Raises:
        OutputDiffers: one is missing or damaged, or is not what ``preprocess`` would make.
    """
    found = {prefix: read_whole(prefix) for prefix in settings.prefixes}
    for prefix, manifest in found.items():
        _compare_manifest(settings, tokenizer, manifest)
        made_at = _last_change(manifest_path(prefix))
        for source in settings.sources:
            changed_at = source.identity()[2] if source.path is None else _last_change(source.path)
            if not isinstance(changed_at, int):
                raise OutputDiffers(f"nothing tells whether {source.name} was changed since")
            if changed_at > made_at:
                raise OutputDiffers(f"{source.name} was changed since")
    return found


def _last_change(path: Path) -> int:
    """Return when a file last got its content or its name, in nanoseconds.

    The time of its content alone is older than that where a file was moved or copied here with its times.
    """
    status = path.stat()
    return max(status.st_mtime_ns, status.st_ctime_ns)


def read_whole(prefix: Path | str) -> Manifest:
    """Read the manifest of a dataset whose three files are there and belong together.

    Raises:
        OutputDiffers: a file is missing or belongs to another dataset.
    """
    for path in dataset_files(prefix):
        if not path.exists():
            raise OutputDiffers(f"there is no {path}")
    try:
        manifest = read_manifest(prefix)
        assert manifest is not None
        check_manifest(prefix, manifest)
    except UserError as error:
        raise OutputDiffers(f"{error.where}: {error.problem}") from None
    return manifest


def _compare_manifest(settings: PreprocessSettings, tokenizer: Tokenizer, manifest: Manifest) -> None:
    """Compare what a dataset was made with and what is requested now."""
    requested = {
        "tokenizer": tokenizer.fingerprint,
        "append_eod": settings.append_eod,
        "end of document": tokenizer.eod_id if settings.append_eod else None,
        "shuffle_seed": settings.shuffle_seed,
        "inputs": [source.name for source in settings.sources],
        **settings.determining_options,
    }
    made = {
        "tokenizer": manifest.tokenizer.fingerprint,
        "append_eod": manifest.append_eod,
        "end of document": manifest.tokenizer.eod_id if manifest.append_eod else None,
        "shuffle_seed": manifest.shuffle_seed,
        "inputs": manifest.sources,
        **manifest.options,
    }
    compare(made, requested)
    if manifest.skipped and settings.on_error == "refuse":
        raise OutputDiffers("it was made with --on-error skip and left documents out")


def compare(made: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Compare what an output was made with and what is requested now.

    Raises:
        OutputDiffers: the text names the first key that differs, and both values.
    """
    for key in {**requested, **made}:
        if made.get(key) != requested.get(key):
            if key == "inputs" and (changed := _changed_inputs(made.get(key), requested.get(key))):
                raise OutputDiffers(f"{changed[0]} was changed since")
            before, now = _shorten(made.get(key)), _shorten(requested.get(key))
            raise OutputDiffers(f"it was made with {key} {before}, this command has {now}")


def _changed_inputs(made: Any, requested: Any) -> list[str]:
    """Return the names of inputs (name, bytes, time of change) that are named in both lists and differ."""
    if not all(isinstance(entry, list) for inputs in (made, requested) for entry in inputs or ()):
        return []
    before = {entry[0]: entry for entry in made or ()}
    return [entry[0] for entry in requested or () if before.get(entry[0], entry) != entry]


def _shorten(value: Any) -> str:
    """Return ``value`` as text of at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def note_path(output: Path) -> Path:
    """Return the path of the note on how ``output``, a file or a folder's files, was made."""
    return output.with_name(f"{output.name}.made")


def write_note(note: Path, requested: Mapping[str, Any], files: Sequence[Path], report: Mapping[str, Any]) -> None:
    """Write a note that says what was requested, which files came of it, and what was reported of them.

    Args:
        note: the file to write.
        requested: the options and inputs that the files depend on, as values that JSON can represent.
        files: the files that were made.
        report: what was reported.

    Raises:
        UserError: the disk is full or read-only.
    """
    content = {"asked": requested, "files": {path.name: block_checksums(path) for path in files}, "report": report}
    write_atomically(note, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_note(note: Path, requested: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """Return what was reported of ``files`` when they were made.

    Raises:
        OutputDiffers: a file is missing or was changed since, or something else was requested then.
    """
    try:
        content = json.loads(note.read_bytes())
        made, checksums, report = content["asked"], content["files"], content["report"]
    except FileNotFoundError:
        raise OutputDiffers(f"nothing tells how it was made (there is no {note})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputDiffers(f"{note} cannot be read: {error}") from None
    for path in files:
        if not path.exists():
            raise OutputDiffers(f"there is no {path}")
        if checksums.get(path.name) != block_checksums(path):
            raise OutputDiffers(f"{path} was changed since")
    compare(made, json.loads(json.dumps(requested)))
    return report
