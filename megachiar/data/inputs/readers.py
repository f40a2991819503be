"""Read documents from files, and report every defect of a corpus.

Reading has two halves, so that one process can do the cheap half and many processes the expensive one:

    sources --read_chunks--> Chunk (raw bytes, cut between documents) --parse_chunk--> Document | InvalidDocument
             one process, disk and decompression only                  any process, UTF-8 and JSON

    find_inputs.py      which files are named        folder_files.py     what a folder gives and leaves out
    source.py           one file, its format by name folder_walk.py      all files of a folder
    recognition.py      what a file really is        own_files.py        files that our own commands wrote
    compression.py      blocks of a file's text      documents.py        chunks, valid and invalid documents
    parsing.py          documents out of chunks      records.py          texts, ids and label of one record
    text_reader.py      text and JSON lines          parquet_reader.py   parquet
    json_array.py       one array of JSON            arrow_reader.py     Arrow
    csv_reader.py       comma-separated values       columns.py          rows of parquet and Arrow
    keys.py             a value by its key           dataset_folder.py   folders that `datasets` wrote
    remote.py           inputs at URLs               chunk_groups.py     chunks of many small files together
    source_reading.py   a checksum made on the way   pipe.py             named pipes

A chunk holds about ``chunk_bytes`` and never a part of a document, so memory is bounded whatever the input's size.
A defect that makes the rest of a file unreadable (a truncated .gz, a parquet file without the column) always ends the
run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from megachiar.data.inputs.arrow_reader import arrow_chunks
from megachiar.data.inputs.compression import OnContent
from megachiar.data.inputs.documents import (
    Chunk,
    Document,
    InvalidDocument,
    InvalidDocumentLog,
    ReadOptions,
)
from megachiar.data.inputs.parquet_reader import parquet_chunks
from megachiar.data.inputs.parsing import parse_chunk
from megachiar.data.inputs.source import Source
from megachiar.data.inputs.source_reading import SourceRecorder
from megachiar.data.inputs.text_reader import text_chunks
from megachiar.errors import UserError, disk_error


def read_chunks(
    sources: Iterable[Source], options: ReadOptions, recorder: SourceRecorder | None = None
) -> Iterator[Chunk]:
    """Yield the chunks of all sources, in order.

    Args:
        sources: the sources to read.
        options: how documents are found in them.
        recorder: makes a record of each source.

    Raises:
        UserError: a source cannot be read to its end, or holds a document above ``options.max_document_bytes``.
    """
    for source in sources:
        with _reading(source):
            on_content = None if recorder is None else recorder.begin(source).add
            yield from chunk_reader(source)(source, options, on_content)


def chunk_reader(source: Source) -> Callable[[Source, ReadOptions, OnContent | None], Iterator[Chunk]]:
    """Return the function that yields the chunks of a source of this format."""
    readers = {"parquet": parquet_chunks, "arrow": arrow_chunks}
    return readers.get(source.format, text_chunks)


def read_documents(
    sources: Iterable[Source], options: ReadOptions, log: InvalidDocumentLog, recorder: SourceRecorder | None = None
) -> Iterator[Document]:
    """Yield all valid documents of the sources, parsed in this process, and add the invalid ones to ``log``.

    Args:
        sources: the sources to read.
        options: how documents are found in them.
        log: where invalid documents are added.
        recorder: makes a record of each source.

    Raises:
        UserError: ``read_chunks`` raises it, or ``log`` refuses an invalid document.
    """
    for chunk in read_chunks(sources, options, recorder):
        for item in parse_chunk(chunk, options):
            if isinstance(item, InvalidDocument):
                log.add(item)
            else:
                log.replaced += item.replaced
                yield item


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turn an error of the system, or of a store's library, while ``source`` is read into a ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise disk_error(source.name, error, "read") from error
    except Exception as error:
        if source.url is None:
            raise
        raise UserError(source.name, f"cannot be read: {error}", "check the connection, and run it again") from error
