"""Join datasets of one tokenizer into one, document after document."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachiar import __version__
from megachiar.data.preprocessing.existing import NO_CHECKSUMS, OutputDiffers, compare, read_whole
from megachiar.data.preprocessing.input_note import InputNote, write_input_note
from megachiar.data.preprocessing.shuffle import shuffle_documents, shuffled_order, unshuffled
from megachiar.data.storage.files import (
    BlockChecksums,
    bin_path,
    block_checksums,
    check_prefix,
    idx_path,
    labels_path,
    manifest_path,
    possible_files,
    remove_dataset,
)
from megachiar.data.storage.identity import file_identity
from megachiar.data.storage.label_writer import LabelsBuilder
from megachiar.data.storage.labels import read_labels
from megachiar.data.storage.manifest import (
    LabelsRecord,
    Manifest,
    TokenizerRecord,
    check_manifest,
    check_same_tokenizer,
    compare_checksums,
    read_manifest,
)
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError

NO_LABELS = np.empty(0, np.int32)
COPY_BLOCK = 1 << 26  # bytes that are copied at once, unless one sequence is longer


def merge_datasets(
    inputs: Sequence[Path | str],
    output: Path | str,
    *,
    overwrite: bool = False,
    allow_missing_manifest: bool = False,
    shuffle_seed: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Manifest | None:
    """Write the documents of all ``inputs``, in their order, to the dataset ``output``, whole or not at all.

    Sequences and documents stay as they are, and so do the labels of labelled datasets. The content of every input that
    has a manifest is compared with its checksum on the way.

    Args:
        inputs: the prefixes of the datasets.
        output: the prefix of the output, which is none of the inputs.
        overwrite: replace a dataset that exists there, at the end.
        allow_missing_manifest: merge although an input has no manifest, so that nothing proves that it was made with
            the same tokenizer; the output then has none either.
        shuffle_seed: the seed of ``shuffle_documents``; None keeps the order of the documents.
        on_bytes: called with the number of bytes of each block copied.

    Returns:
        The output's manifest; None if an input has none.

    Raises:
        UserError: an input is damaged, or its manifest is missing. The types, the tokenizers, the use of
            end-of-document ids or the classes differ. The output is an input or exists as another one, or the disk is
            full.
    """
    if not inputs:
        raise UserError(output, "nothing to merge", "name at least one input dataset")
    check_prefix(output)
    _refuse_own_inputs(inputs, output)
    if not overwrite:
        _refuse_existing(inputs, output, shuffle_seed)
    identities = [_identities(prefix) for prefix in inputs]  # before they are opened, to notice every later change
    datasets = [IndexedDataset(prefix) for prefix in inputs]
    for dataset in datasets:
        dataset.check_index()
    _check_same_type(datasets)
    manifests = _read_manifests(datasets, allow_missing_manifest)
    known = [manifest for manifest in manifests if manifest is not None]
    classes, numbers = _read_labels(datasets, manifests)

    def make_manifest(builder: IndexedDatasetBuilder) -> bytes:
        labels = None
        if classes is not None:
            with contextlib.closing(LabelsBuilder(output)) as written:
                written.add(joined_labels(numbers, shuffle_seed))
                written.complete()
                labels = LabelsRecord(classes=classes, checksums=written.checksums)
        return _merged_manifest(inputs, known, builder, shuffle_seed, labels).to_json()

    first_output = output if shuffle_seed is None else unshuffled(output)
    with IndexedDatasetBuilder(first_output, datasets[0].dtype) as builder:
        for dataset, manifest in zip(datasets, manifests, strict=True):
            append_dataset(builder, dataset, manifest, on_bytes)
        builder.finish(None if shuffle_seed is not None or len(known) < len(manifests) else make_manifest)
    if shuffle_seed is not None:
        with IndexedDatasetBuilder(output, datasets[0].dtype) as builder:
            shuffle_documents(IndexedDataset(unshuffled(output)), builder, shuffle_seed, on_bytes)
            builder.finish(None if len(known) < len(manifests) else make_manifest)
        remove_dataset(unshuffled(output))
    if len(known) == len(manifests):
        parts = zip(identities, known, strict=True)
        write_input_note(output, ([*identity, part.fingerprint] for found, part in parts for identity in found))
    return read_manifest(output)


def _refuse_own_inputs(inputs: Sequence[Path | str], output: Path | str) -> None:
    """Refuse an output that is an input under this or another name, and an input named twice."""
    taken: dict[Path, Path | str] = {}
    for prefix in inputs:
        resolved = bin_path(prefix).resolve()
        if resolved in taken:
            raise UserError(prefix, "is named twice among the inputs", "name each dataset once")
        taken[resolved] = prefix
    for path in (bin_path(output), idx_path(output)):
        for prefix in inputs:
            same = (bin_path(prefix), idx_path(prefix))
            if path.resolve() in [other.resolve() for other in same] or (
                path.exists() and any(other.exists() and path.samefile(other) for other in same)
            ):
                raise UserError(output, f"is the input {prefix}", "write to another name")


def find_merged(inputs: Sequence[Path | str], output: Path | str, shuffle_seed: int | None) -> Manifest:
    """Return the manifest of ``output``, after checking that ``merge_datasets`` would make the same of ``inputs`` now.

    Raises:
        OutputDiffers: it is not, it is not whole, or an input has no manifest.
    """
    made, parts = read_whole(output), [read_whole(prefix) for prefix in inputs]
    requested = [_merged_values(parts, shuffle_seed), *({"tokenizer": part.tokenizer.fingerprint} for part in parts)]
    found = {"tokenizer": made.tokenizer.fingerprint, **{key: getattr(made, key) for key in requested[0]}}
    for values in requested:
        compare({key: found[key] for key in values}, values)
    if not made.parts:
        raise OutputDiffers(NO_CHECKSUMS)
    compare({"number of inputs": len(made.parts)}, {"number of inputs": len(inputs)})
    note = InputNote(output)
    for prefix, part, recorded in zip(inputs, parts, made.parts, strict=True):
        _compare_part(prefix, part, recorded, note)
    return made


def _compare_part(prefix: Path | str, part: Manifest, recorded: str, note: InputNote) -> None:
    """Check that an input is unchanged, by its manifest, and by its files where they were touched since.

    Args:
        prefix: the input.
        part: its manifest.
        recorded: the fingerprint that it had.
        note: what the files of the inputs were when they were read.

    Raises:
        OutputDiffers: it holds something else.
    """
    if part.fingerprint != recorded:
        raise OutputDiffers(f"{manifest_path(prefix)} was changed since")
    if not all(note.proves(identity, recorded) for identity in _identities(prefix)):
        try:
            check_manifest(prefix, part, verify=True)
        except UserError as error:
            raise OutputDiffers(f"{error.where} was changed since: {error.problem}") from None


def _identities(prefix: Path | str) -> list[list[Any]]:
    """Return the identities of the index, the tokens and the labels of a dataset, of those that exist."""
    paths = (idx_path(prefix), bin_path(prefix), labels_path(prefix))
    return [file_identity(path) for path in paths if path.exists()]


def _refuse_existing(inputs: Sequence[Path | str], output: Path | str, shuffle_seed: int | None) -> None:
    """Refuse an output that exists, and say whether it is what this merge would make."""
    for path in possible_files(output):
        if path.exists():
            problem = "exists already"
            try:
                find_merged(inputs, output, shuffle_seed)
            except OutputDiffers as difference:
                problem = f"exists already, and not as this command makes it: {difference}"
            raise UserError(path, problem, "choose another --output, or pass --overwrite")


def _check_same_type(datasets: Sequence[IndexedDataset]) -> None:
    """Check that all datasets store their tokens in the same type."""
    first = datasets[0]
    for dataset in datasets[1:]:
        if dataset.dtype != first.dtype:
            raise UserError(
                idx_path(dataset.prefix),
                f"holds {dataset.dtype.name}, but {idx_path(first.prefix)} holds {first.dtype.name}",
                "preprocess both with the same tokenizer",
            )


def _read_manifests(datasets: Sequence[IndexedDataset], allow_missing: bool) -> list[Manifest | None]:
    """Return the manifests, after checking that each fits its dataset and all fit each other."""
    manifests = [read_manifest(dataset.prefix) for dataset in datasets]
    for dataset, manifest in zip(datasets, manifests, strict=True):
        if manifest is not None:
            check_manifest(dataset.prefix, manifest, dataset)
        elif not allow_missing:
            raise UserError(
                manifest_path(dataset.prefix),
                "there is no manifest, so that nothing tells which tokenizer made this dataset",
                "if you know that it is the same as the others', pass --allow-missing-manifest",
            )
    check_same_tokenizer([(dataset.prefix, manifest) for dataset, manifest in zip(datasets, manifests, strict=True)])
    known = [(d.prefix, m) for d, m in zip(datasets, manifests, strict=True) if m is not None]
    for prefix, manifest in known[1:]:
        _check_same_edges(prefix, manifest, *known[0])
    return manifests


def _check_same_edges(prefix: Path, manifest: Manifest, first_prefix: Path, first: Manifest) -> None:
    """Check that the documents of two datasets begin and end alike."""
    if manifest.append_eod != first.append_eod:
        raise UserError(
            manifest_path(prefix),
            f"append_eod is {manifest.append_eod}, but {first.append_eod} for {first_prefix}",
            "preprocess both with or both without --append-eod",
        )
    if manifest.append_eod and manifest.tokenizer.eod_id != first.tokenizer.eod_id:
        raise UserError(
            manifest_path(prefix),
            f"documents end with id {manifest.tokenizer.eod_id}, but with {first.tokenizer.eod_id} in {first_prefix}",
            "preprocess both with the same --eod-token",
        )
    if manifest.tokenizer.bos_id != first.tokenizer.bos_id:
        raise UserError(
            manifest_path(prefix),
            f"documents begin with {_beginning(manifest)}, but with {_beginning(first)} in {first_prefix}",
            "preprocess both with or both without --prepend-bos, and with the same --bos-token",
        )


def _beginning(manifest: Manifest) -> str:
    """Say what the documents of a dataset begin with."""
    return "their text" if manifest.tokenizer.bos_id is None else f"id {manifest.tokenizer.bos_id}"


def _read_labels(
    datasets: Sequence[IndexedDataset], manifests: Sequence[Manifest | None]
) -> tuple[list[str] | None, list[NDArray[Any]]]:
    """Return the classes of all datasets, and the class numbers of each one's documents; None and none without labels.

    Raises:
        UserError: some have labels and others have none, or their classes differ.
    """
    records = [None if manifest is None else manifest.labels for manifest in manifests]
    classes = [None if record is None else record.classes for record in records]
    for dataset, names in zip(datasets[1:], classes[1:], strict=True):
        if names != classes[0]:
            raise UserError(
                manifest_path(dataset.prefix),
                f"has {_describe(names)}, but {datasets[0].prefix} {_describe(classes[0])}",
                "preprocess both with the same classes in the same order: --classes a,b,c or --classes-from PREFIX",
            )
    if classes[0] is None:
        return None, []
    pairs = zip(datasets, manifests, strict=True)
    return classes[0], [read_labels(dataset.prefix, manifest, dataset.documents).numbers for dataset, manifest in pairs]


def _describe(classes: list[str] | None) -> str:
    return "no labels" if classes is None else f"the classes {', '.join(classes)[:200]}"


def joined_labels(numbers: Sequence[NDArray[Any]], shuffle_seed: int | None) -> NDArray[Any]:
    """Return the class numbers of joined datasets, in the order that ``shuffle_documents`` gives the documents."""
    joined = np.concatenate(numbers)
    return joined if shuffle_seed is None else joined[shuffled_order(joined.size, shuffle_seed)]


def append_dataset(
    builder: IndexedDatasetBuilder,
    dataset: IndexedDataset,
    manifest: Manifest | None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Copy ``dataset`` to the end of ``builder``, and compare it with the manifest's checksums.

    Args:
        builder: the output.
        dataset: the dataset to copy.
        manifest: its manifest; None checks nothing.
        on_bytes: called with the number of bytes of each block copied.

    Raises:
        UserError: its content differs from the manifest's record.
    """
    offset, documents = builder.sequences, 0
    ends = dataset.document_starts[1:]
    digests = BlockChecksums()
    for part in _copy_blocks(dataset):
        lengths = dataset.lengths[part]
        first = int(dataset.pointers[part.start]) // dataset.dtype.itemsize
        tokens = dataset.tokens[first : first + int(lengths.sum(dtype=np.int64))]
        documents_done = int(np.searchsorted(ends, part.stop, side="right"))
        builder.add_sequences(tokens, lengths, offset + ends[documents:documents_done])
        documents = documents_done
        if manifest is not None:
            digests.update(tokens)
        if on_bytes is not None:
            on_bytes(tokens.nbytes)
    if manifest is not None:
        compare_checksums(bin_path(dataset.prefix), digests.digests(), manifest.checksums.bin)
        compare_checksums(idx_path(dataset.prefix), block_checksums(idx_path(dataset.prefix)), manifest.checksums.idx)


def _copy_blocks(dataset: IndexedDataset) -> Iterator[slice]:
    """Yield the sequences in stretches of at most ``COPY_BLOCK`` bytes, or of one sequence."""
    first = 0
    while first < len(dataset):
        limit = int(dataset.pointers[first]) + COPY_BLOCK
        last = max(first + 1, int(np.searchsorted(dataset.pointers, limit, side="right")) - 1)
        last = len(dataset) if dataset.tokens.nbytes <= limit else last
        yield slice(first, last)
        first = last


def _merged_manifest(
    inputs: Sequence[Path | str],
    manifests: Sequence[Manifest],
    builder: IndexedDatasetBuilder,
    shuffle_seed: int | None,
    labels: LabelsRecord | None,
) -> Manifest:
    """Return the manifest of the merged dataset, whose files are complete."""
    known = all(len(manifest.source_checksums) == len(manifest.sources) for manifest in manifests)
    sizes = [size for manifest in manifests for size in manifest.source_bytes] if known else []
    checksums = [checksum for manifest in manifests for checksum in manifest.source_checksums] if known else []
    return replace(
        manifests[0],
        tokenizer=_with_absolute_file(manifests[0].tokenizer, manifest_path(inputs[0]).parent),
        largest_token_id=builder.largest_token_id,
        checksums=builder.checksums,
        source_bytes=sizes,
        source_checksums=checksums,
        parts=[manifest.fingerprint for manifest in manifests],
        labels=labels,
        created_by=f"megachiar {__version__} merge_datasets",
        **_merged_values(manifests, shuffle_seed),
    )


def _merged_values(manifests: Sequence[Manifest], shuffle_seed: int | None) -> dict[str, Any]:
    """Return those fields of the merged dataset's manifest that follow from the manifests of the inputs."""
    options = manifests[0].options
    skipped: Counter[str] = Counter()
    for manifest in manifests:
        skipped.update(manifest.skipped)
    return {
        "append_eod": manifests[0].append_eod,
        "documents": sum(manifest.documents for manifest in manifests),
        "tokens": sum(manifest.tokens for manifest in manifests),
        "text_bytes": sum(manifest.text_bytes for manifest in manifests),
        "words": sum(manifest.words for manifest in manifests),
        "skipped": dict(skipped),
        "replaced": sum(manifest.replaced for manifest in manifests),
        "shuffle_seed": shuffle_seed,
        "options": options if all(manifest.options == options for manifest in manifests) else {},
        "sources": [source for manifest in manifests for source in manifest.sources],
    }


def _with_absolute_file(tokenizer: TokenizerRecord, folder: Path) -> TokenizerRecord:
    """Make the tokenizer's path absolute: a relative one is relative to ``folder``, which need not be the output's."""
    return replace(tokenizer, file=str((folder / tokenizer.file).resolve()))
