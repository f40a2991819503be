"""Preprocess with many processes that share only a file system: MPI ranks, or the jobs of a Slurm array.

    inputs in order --share--> shard 0, shard 1, ... (each a run of ``preprocess``)  --merge--> the dataset

Shards are stretches of the inputs, so that the merged files are byte for byte those that one process writes. They are
kept in ``PREFIX.shards`` until the merge is done. A shard that is whole already is not made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from numpy.typing import NDArray

from megachiar.data.inputs.documents import InvalidDocument, InvalidDocumentLog
from megachiar.data.preprocessing.classes import ClassTable
from megachiar.data.preprocessing.example_checks import check_examples, check_known_classes
from megachiar.data.preprocessing.existing import OutputDiffers, compare_records
from megachiar.data.preprocessing.input_note import write_input_note
from megachiar.data.preprocessing.merge import NO_LABELS, append_dataset, joined_labels
from megachiar.data.preprocessing.output import Output, make_manifest
from megachiar.data.preprocessing.preprocess import check_outputs, existing_report, preprocess
from megachiar.data.preprocessing.report import Report, describe_document_end
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shuffle import shuffle_documents, unshuffled
from megachiar.data.storage.files import check_prefix, put_in_place, remove_dataset, write_atomically
from megachiar.data.storage.index_format import dtype_for_vocabulary
from megachiar.data.storage.label_writer import LabelsBuilder
from megachiar.data.storage.labels import read_labels
from megachiar.data.storage.manifest import read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_sealed, with_seal
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError, disk_errors

Builder = TypeVar("Builder", IndexedDatasetBuilder, LabelsBuilder)

_RECORDED = {"identity", "skipped", "examples"}  # keys of the record of a shard


def shard_folder(settings: PreprocessSettings) -> Path:
    """Return the folder that keeps the shards of a run until they are merged."""
    return Path(f"{settings.output_prefix}.shards")


def shard_settings(settings: PreprocessSettings, number: int, shards: int) -> PreprocessSettings:
    """Return the settings of the run that makes shard ``number`` of ``shards`` from its share of the inputs.

    Raises:
        UserError: there is no such shard, there are more shards than inputs, or standard input is to be shared.
    """
    if not 0 <= number < shards:
        raise UserError("--shard", f"shard {number} of {shards}", f"shards of {shards} are 0 to {shards - 1}")
    if not all(source.can_be_read_again for source in settings.sources):
        raise UserError("--input", "standard input cannot be shared by many processes", "name files")
    check_prefix(settings.output_prefix)
    count = len(settings.sources)
    if shards > count:
        raise UserError(
            "--shard", f"{shards} shards of {count} inputs", f"use at most {count} shards, or cut the files"
        )
    first, end = number * count // shards, (number + 1) * count // shards
    return dataclasses.replace(
        settings,
        sources=settings.sources[first:end],
        output_prefix=shard_folder(settings) / f"{number:05d}-of-{shards:05d}",
        shuffle_seed=None,  # the merged dataset is shuffled
        overwrite=True,
        allow_empty=True,
    )


def make_shard(settings: PreprocessSettings, number: int, shards: int, stream: TextIO | None = None) -> Report | None:
    """Make shard ``number`` of ``shards``.

    Returns:
        The report; None if the shard, or the whole dataset, exists already.

    Raises:
        UserError: ``preprocess`` or ``shard_settings`` raises it.
    """
    check_examples(settings)
    check_known_classes(settings)
    with disk_errors(shard_folder(settings), "read or write"):
        return _make_shard(settings, shard_settings(settings, number, shards), stream)


def _make_shard(settings: PreprocessSettings, shard: PreprocessSettings, stream: TextIO | None) -> Report | None:
    """Make the shard with the settings ``shard`` of the run ``settings``."""
    record, known = _record_path(shard), None if settings.restart else _read_record(_record_path(shard))
    if known is not None and _is_made_by(known, shard, stream):
        return None
    if _merged_before(settings) is not None:
        return None
    check_outputs(settings, settings.load_tokenizer())
    record.unlink(missing_ok=True)
    for prefix in shard.prefixes:
        remove_dataset(prefix)
    report = preprocess(shard, stream)
    log = {"skipped": dict(report.log.counts), "examples": report.log.examples, "replaced": report.log.replaced}
    unknown = [report.unknown_tokens[prefix] for prefix in shard.prefixes]
    identity = [*_options(shard), report.source_records]
    whole = {"identity": identity, **log, "unknown_tokens": unknown}
    write_atomically(record, json.dumps(with_seal(whole), ensure_ascii=False).encode())
    return report


def merge_shards(settings: PreprocessSettings, shards: int, on_bytes: Callable[[int], None] | None = None) -> Report:
    """Join all shards to the datasets that one process would have written, and remove the shards.

    Args:
        settings: the settings of the run.
        shards: how many shards were made.
        on_bytes: called with the number of bytes of each block copied.

    Raises:
        UserError: shards are missing, damaged or of another call; an output exists; or a part has no document.
    """
    if shards < 1:
        raise UserError("--merge-shards", f"{shards} shards", "give the number of shards that were made")
    check_examples(settings)
    check_known_classes(settings)
    if (merged := _merged_before(settings)) is not None:
        return merged
    parts = [shard_settings(settings, number, shards) for number in range(shards)]
    with disk_errors(shard_folder(settings), "read or write"):
        return _merge(settings, parts, on_bytes)


def _merge(
    settings: PreprocessSettings, shards: list[PreprocessSettings], on_bytes: Callable[[int], None] | None
) -> Report:
    """Merge the shards that were made with the settings ``shards``."""
    tokenizer = settings.load_tokenizer()
    if not _finishing(settings).exists():
        check_outputs(settings, tokenizer)
    records = _records(shards)
    log = _merged_log(records)
    sources = [source for record in records for source in record["identity"][-1]]
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    classes = ClassTable(settings.classes) if settings.labelled else None

    def manifest_of(output: Output) -> Callable[[IndexedDatasetBuilder], bytes]:
        return lambda _: make_manifest(settings, tokenizer, output, log, sources).to_json()

    with contextlib.ExitStack() as stack:
        for part, prefix in enumerate(settings.prefixes):
            first = prefix if settings.shuffle_seed is None else unshuffled(prefix)
            output = Output(prefix, stack.enter_context(_closing(IndexedDatasetBuilder(first, dtype))), classes=classes)
            numbers = [_append_part(output, shard.prefixes[part], on_bytes) for shard in shards]
            if output.builder.tokens == 0:
                raise UserError(prefix, "no shard holds a document of this part", "give it a larger weight")
            if settings.shuffle_seed is not None:
                output.builder.finish()
                output.builder = stack.enter_context(_closing(IndexedDatasetBuilder(prefix, dtype)))
                shuffle_documents(IndexedDataset(unshuffled(prefix)), output.builder, settings.shuffle_seed, on_bytes)
                remove_dataset(unshuffled(prefix))
            if classes is not None:
                output.labels = stack.enter_context(_closing(LabelsBuilder(prefix)))
                output.labels.add(joined_labels(numbers, settings.shuffle_seed))
                output.complete_labels()
            output.builder.complete(manifest_of(output))
        with disk_errors(settings.output_prefix):
            _finishing(settings).touch()  # from here on, outputs that exist are this call's own
            for prefix in settings.prefixes:
                put_in_place(prefix)
            write_input_note(settings.output_prefix, sources)
    shutil.rmtree(shard_folder(settings))
    counted = [_unknown_tokens(record, len(settings.prefixes)) for record in records]
    unknown = [_sum_if_known(counts) for counts in zip(*counted, strict=True)]
    return Report(
        manifests={prefix: manifest for prefix in settings.prefixes if (manifest := read_manifest(prefix)) is not None},
        log=log,
        found=settings.found,
        document_end=describe_document_end(tokenizer, settings),
        unknown_id=tokenizer.unknown_id,
        unknown_tokens=dict(zip(settings.prefixes, unknown, strict=True)),
    )


def _merged_before(settings: PreprocessSettings) -> Report | None:
    """Report on the datasets if an earlier call has merged all shards; return None if there is something to do."""
    return None if shard_folder(settings).exists() else existing_report(settings, settings.load_tokenizer())


def _append_part(output: Output, shard: Path, on_bytes: Callable[[int], None] | None) -> NDArray[Any]:
    """Add one part of a shard to the output, and return the class numbers of its documents; none without labels."""
    manifest = read_manifest(shard)
    if manifest is None:  # this shard has no document of this part
        return NO_LABELS
    append_dataset(output.builder, IndexedDataset(shard), manifest, on_bytes)
    output.text_bytes += manifest.text_bytes
    output.words += manifest.words
    return NO_LABELS if manifest.labels is None else read_labels(shard, manifest, manifest.documents).numbers


def _records(shards: list[PreprocessSettings]) -> list[dict[str, Any]]:
    """Return the record of each shard.

    Raises:
        UserError: a shard is missing or was made by another call.
    """
    records = []
    for number, shard in enumerate(shards):
        record = _read_record(_record_path(shard))
        if record is None or not _is_made_by(record, shard):
            state = "was not made" if record is None else "was made by another call, or its inputs were changed since"
            raise UserError(shard.output_prefix, f"shard {number} of {len(shards)} {state}", "make it before the merge")
        records.append(record)
    return records


def _merged_log(records: list[dict[str, Any]]) -> InvalidDocumentLog:
    """Return the documents that all shards left out, in the order of the inputs."""
    log = InvalidDocumentLog("skip")
    for record in records:
        examples = [InvalidDocument(*example) for example in record["examples"]]
        log.merge(InvalidDocumentLog("skip", Counter(record["skipped"]), examples, record.get("replaced", 0)))
    return log


def _unknown_tokens(record: dict[str, Any], parts: int) -> list[int | None]:
    """Return the unknown tokens of each part of a shard; None where an earlier version did not count them."""
    return record.get("unknown_tokens") or [None] * parts


def _sum_if_known(counts: Iterable[int | None]) -> int | None:
    """Return the sum of ``counts``; None if one of them is."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def _options(shard: PreprocessSettings) -> list[Any]:
    """Return the values that, beside the inputs, determine the content of a shard."""
    tokenizer = shard.load_tokenizer()
    return [tokenizer.fingerprint, tokenizer.eod_id if shard.append_eod else None, shard.determining_options]


def _is_made_by(record: dict[str, Any], shard: PreprocessSettings, stream: TextIO | None = None) -> bool:
    """Return whether the shard of a record is the one that a call would make."""
    *options, sources = record["identity"]
    if options != _options(shard):
        return False
    try:
        compare_records(sources, shard.sources, shard.read, stream)
    except OutputDiffers:
        return False
    return True


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a shard; None if the shard is not complete, or its record cannot be read."""
    try:
        record = parse_sealed(read_regular(path))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and record.keys() >= _RECORDED else None


def _record_path(shard: PreprocessSettings) -> Path:
    """Return the file that marks a shard as complete and lists the documents that it left out."""
    return Path(f"{shard.output_prefix}.done")


def _finishing(settings: PreprocessSettings) -> Path:
    """Return the file that exists while outputs get their final names."""
    return shard_folder(settings) / "finishing"


@contextlib.contextmanager
def _closing(builder: Builder) -> Iterator[Builder]:
    """Abort a builder if the block fails, and close its files if not."""
    try:
        yield builder
    except BaseException:
        builder.abort()
        raise
    builder.close()
