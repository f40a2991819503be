"""Tell whether an output that exists is what a command would make, so that the same command can be given twice.

A dataset's manifest says what it was made of, and ``PREFIX.inputs`` when its inputs were last changed before they were
read; a tokenizer or corpus has a note ``NAME.made`` beside it. An input that has other times than it had then is read,
and counts as another input if its text is another one. No time of an output matters: copying it changes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.source import Source
from megachiar.data.preprocessing.input_note import InputNote
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.source_records import Suspect, find_changed, find_other_content
from megachiar.data.storage.files import block_checksums, dataset_files, write_atomically
from megachiar.data.storage.manifest import Manifest, check_manifest, read_manifest
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_sealed, with_seal
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.errors import UserError

NO_CHECKSUMS = "it was made by an earlier version, which recorded nothing that tells whether the inputs changed since"
SAME = "exists already and is what this command makes: nothing was done"


class OutputDiffers(Exception):
    """An output that exists is not whole, or is not what the command would make; the text says why."""


def find_existing(
    settings: PreprocessSettings, tokenizer: Tokenizer, stream: TextIO | None = None
) -> dict[Path, Manifest]:
    """Return the manifest of each dataset that ``preprocess`` would make, where all of them exist already.

    Args:
        settings: what ``preprocess`` is to do.
        tokenizer: what it encodes with.
        stream: where progress is shown while inputs are compared; standard error if None.

    Raises:
        OutputDiffers: one is missing or damaged, or is not what ``preprocess`` would make.
        UserError: an input cannot be read.
    """
    found = {prefix: read_whole(prefix) for prefix in settings.prefixes}
    for manifest in found.values():
        _compare_manifest(settings, tokenizer, manifest)
        _compare_content(settings, manifest, stream)
    return found


def _compare_content(settings: PreprocessSettings, manifest: Manifest, stream: TextIO | None) -> None:
    """Check that the sources have the sizes that were recorded, and those whose times are others the content."""
    if settings.sources and not manifest.source_checksums:
        raise OutputDiffers(NO_CHECKSUMS)
    note, suspects = InputNote(settings.output_prefix), []
    states = zip(settings.sources, manifest.source_bytes, manifest.source_checksums, strict=True)
    for source, size, checksum in states:
        if not source.can_be_read_again:
            raise OutputDiffers(f"nothing tells whether {source.name} was changed since")
        if not note.proves(source.identity(), checksum):
            suspects.append(Suspect(source, size, checksum))
    changed = find_other_content(suspects, settings.read, stream)
    if changed is not None:
        raise OutputDiffers(f"{changed.name} was changed since")


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
        "beginning of document": tokenizer.bos_id,
        "shuffle_seed": settings.shuffle_seed,
        "inputs": [source.name for source in settings.sources],
        **settings.determining_options,
    }
    made = {
        "tokenizer": manifest.tokenizer.fingerprint,
        "append_eod": manifest.append_eod,
        "end of document": manifest.tokenizer.eod_id if manifest.append_eod else None,
        "beginning of document": manifest.tokenizer.bos_id,
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
            before, now = _shorten(made.get(key)), _shorten(requested.get(key))
            raise OutputDiffers(f"it was made with {key} {before}, this command has {now}")


def compare_records(
    records: Sequence[Sequence[Any]], sources: Sequence[Source], read: ReadOptions, stream: TextIO | None = None
) -> None:
    """Compare the inputs of an output, as they were recorded, with those that are named now.

    Args:
        records: the record of each input, see ``source_records``.
        sources: the inputs that are named now.
        read: how the inputs are read.
        stream: where progress is shown while inputs are compared; standard error if None.

    Raises:
        OutputDiffers: others are named, or one has another text.
        UserError: an input cannot be read.
    """
    compare({"inputs": [record[0] for record in records]}, {"inputs": [source.name for source in sources]})
    changed = find_changed(sources, records, read, stream)
    if changed is not None:
        raise OutputDiffers(f"{changed.name} was changed since")


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
    write_atomically(note, (json.dumps(with_seal(content), indent=2, ensure_ascii=False) + "\n").encode())


def read_note(
    note: Path,
    requested: Mapping[str, Any],
    files: Iterable[Path],
    compare_inputs: Callable[[Any], None] = lambda records: None,
) -> dict[str, Any]:
    """Return what was reported of ``files`` when they were made.

    Args:
        note: the file that ``write_note`` wrote.
        requested: what is requested now, without the inputs.
        files: the files that would be made.
        compare_inputs: called with the records of the inputs, to raise ``OutputDiffers`` if they are others now.

    Raises:
        OutputDiffers: a file is missing or was changed since, or something else was requested then.
    """
    try:
        content = parse_sealed(read_regular(note))
        made, checksums, report = content["asked"], content["files"], content["report"]
        if not all(isinstance(part, dict) for part in (made, checksums, report)):
            raise ValueError("it is no note of an output")
    except FileNotFoundError:
        raise OutputDiffers(f"nothing tells how it was made (there is no {note})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputDiffers(f"{note} cannot be read: {error}") from None
    for path in files:
        if not path.exists():
            raise OutputDiffers(f"there is no {path}")
        if checksums.get(path.name) != block_checksums(path):
            raise OutputDiffers(f"{path} was changed since")
    records = made.pop("inputs", [])
    compare(made, json.loads(json.dumps(requested)))
    compare_inputs(records)
    return report
