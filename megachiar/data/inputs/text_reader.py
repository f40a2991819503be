"""Cut text files and JSON lines into chunks of whole documents, and hand other formats of text to their readers."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from typing import Literal

from megachiar.data.inputs.compression import READ_BYTES, OnContent, text_blocks
from megachiar.data.inputs.csv_reader import csv_chunks
from megachiar.data.inputs.documents import Chunk, ReadOptions
from megachiar.data.inputs.json_array import array_chunks
from megachiar.data.inputs.recognition import HEAD_BYTES, json_layout, refuse_what_is_no_text
from megachiar.data.inputs.source import Source
from megachiar.data.inputs.text_errors import too_large


def text_chunks(source: Source, options: ReadOptions, on_content: OnContent | None = None) -> Iterator[Chunk]:
    """Yield the chunks of a source of text, JSON or comma-separated values.

    Args:
        source: the source to read.
        options: how documents are found in it.
        on_content: called with the bytes of the source as they are read from the disk.

    Raises:
        UserError: the source holds something else, or a document above ``options.max_document_bytes``.
    """
    mark, blocks = _open_text(source, on_content)
    if source.format == "csv":
        yield from csv_chunks(source, mark, blocks, options)
    elif source.format == "jsonl":
        head, size = next(blocks)
        blocks = itertools.chain([(head, size)], blocks)
        if json_layout(head) == "array":
            yield from array_chunks(source, mark, blocks, options)
        else:
            yield from _line_chunks(source, "jsonl", mark, blocks, options)
    elif options.txt_documents == "file":
        yield _whole_file(source, mark, blocks, options)
    else:
        yield from _line_chunks(source, options.txt_documents, mark, blocks, options)


def first_bytes(source: Source, least: int) -> bytes:
    """Return the first ``least`` decompressed bytes of ``source``, or a few more; all of them if there are fewer.

    Raises:
        UserError: they cannot be read or decompressed.
    """
    head = b""
    for block, _ in text_blocks(source):
        head += block
        if len(head) >= least:
            break
    return head


def _open_text(source: Source, on_content: OnContent | None) -> tuple[int, Iterator[tuple[bytes, int]]]:
    """Return the length of the byte order mark and ``text_blocks`` without it; refuse a source that is not text."""
    blocks = text_blocks(source, on_content)
    head, consumed = b"", 0
    for block, size in blocks:
        head, consumed = head + block, consumed + size
        if len(head) >= HEAD_BYTES:
            break
    refuse_what_is_no_text(source, head[:READ_BYTES])
    mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    return mark, itertools.chain([(head[mark:], consumed)], blocks)


def _whole_file(source: Source, mark: int, blocks: Iterator[tuple[bytes, int]], options: ReadOptions) -> Chunk:
    """Read a file that is one document; ``mark`` is where its text begins."""
    parts, total, consumed = [], 0, 0
    for block, size in blocks:
        parts.append(block)
        total, consumed = total + len(block), consumed + size
        if total > options.max_document_bytes:
            raise too_large(source, "file", total, options, "split it with --txt-documents line or blank-line, or ")
    return Chunk(
        source.name,
        layout="documents",
        offset=mark,
        consumed=consumed,
        compressed=bool(source.compression),
        rows=[b"".join(parts)],
    )


def _line_chunks(
    source: Source,
    layout: Literal["jsonl", "line", "blank-line"],
    offset: int,
    blocks: Iterator[tuple[bytes, int]],
    options: ReadOptions,
) -> Iterator[Chunk]:
    """Cut a source of lines or paragraphs, whose text begins at ``offset``, into chunks of whole ones."""
    last_cut = _last_paragraph_end if layout == "blank-line" else _last_line_end
    buffer, searched, consumed, line = bytearray(), 0, 0, 1

    def chunk(data: bytes) -> Chunk:
        return Chunk(source.name, layout, data, line, offset, consumed, bool(source.compression))

    for block, size in blocks:
        buffer += block
        consumed += size
        if len(buffer) < options.chunk_bytes:
            continue
        cut = last_cut(buffer, searched)
        searched = 0 if cut else len(buffer)
        if cut:
            data = bytes(memoryview(buffer)[:cut])
            del buffer[:cut]
            yield chunk(data)
            line, offset, consumed = line + data.count(b"\n"), offset + cut, 0
        elif len(buffer) > options.max_document_bytes:
            what = "document" if layout == "blank-line" else "line"
            remedy = "write one JSON object per line, or " if layout == "jsonl" else "split it, or "
            raise too_large(source, f"{what} at line {line} (byte {offset})", len(buffer), options, remedy)
    if buffer or consumed:
        yield chunk(bytes(buffer))


def _last_line_end(buffer: bytearray, searched: int) -> int:
    """Return the bytes up to the last line end of ``buffer``, 0 if it has none; the first ``searched`` have none."""
    return buffer.rfind(b"\n", searched) + 1


def _last_paragraph_end(buffer: bytearray, searched: int) -> int:
    """Return the bytes of ``buffer`` up to the end of its last blank line, 0 if it has none."""
    end = buffer.rfind(b"\n")
    lowest = max(0, buffer.rfind(b"\n", 0, searched))  # a blank line may have begun in the searched part
    while end > lowest:
        start = buffer.rfind(b"\n", 0, end)
        if start >= 0 and not buffer[start + 1 : end].strip():
            return end + 1
        end = start
    return 0
