"""Text from files: what a corpus may look like, and every way in which it can be broken.

Reading is split in two so that the cheap half can feed many processes with the dear half:

    sources --read_chunks--> Chunk (raw bytes, cut between documents) --parse_chunk--> Document | InvalidDocument
             one process, disk and decompression only                  any process, UTF-8 and JSON

    find_inputs.py      which files are named        folder_files.py     what a folder gives and leaves out
    source.py           one file, its format by name recognition.py      what it is, whatever its name says
    compression.py      blocks of its text           documents.py        valid and invalid documents
    text_reader.py      text and JSON lines          parquet_reader.py   parquet

A chunk holds about ``chunk_bytes`` and never a part of a document, so memory is bounded whatever the input's size.
What makes the rest of a file unreadable (a truncated .gz, a parquet file without the column) always ends the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from megachiar.data.inputs.documents import (
    Chunk,
    Document,
    InvalidDocument,
    InvalidDocumentLog,
    ReadOptions,
    parse_chunk,
)
from megachiar.data.inputs.parquet_reader import parquet_chunks
from megachiar.data.inputs.source import Source
from megachiar.data.inputs.text_reader import text_chunks
from megachiar.errors import UserError, disk_error


def read_chunks(sources: Iterable[Source], options: ReadOptions) -> Iterator[Chunk]:
    """Chunks of all sources, in order.

    Raises:
        UserError: a source cannot be read to its end, or holds a document above ``options.max_document_bytes``.
    """
    for source in sources:
        with _reading(source):
            yield from (parquet_chunks if source.format == "parquet" else text_chunks)(source, options)


def read_documents(sources: Iterable[Source], options: ReadOptions, log: InvalidDocumentLog) -> Iterator[Document]:
    """All usable documents in this process; what cannot be used goes to ``log``."""
    for chunk in read_chunks(sources, options):
        for item in parse_chunk(chunk, options.text_key):
            if isinstance(item, InvalidDocument):
                log.add(item)
            else:
                yield item


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turn what the system, or a store's library, refuses while ``source`` is read into a clear error."""
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
