"""Text from files: what a corpus may look like, and every way in which it can be broken.

Reading is split in two so that the cheap half can feed many processes with the dear half:

    sources --read_chunks--> Chunk (raw bytes, cut between documents) --parse_chunk--> Document | Trouble
             one process, disk and decompression only                  any process, UTF-8 and JSON

A chunk holds about ``chunk_bytes`` and never a part of a document, so memory is bounded whatever the input's size.

A *trouble* is a document that cannot be used; whether it is skipped or ends the run is the user's choice
(``TroubleLog``). What makes the rest of a file unreadable (a truncated .gz, a parquet file without the column) always
ends the run.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from megachiar.data import remote
from megachiar.data.files import read_ahead
from megachiar.errors import UserError

Format = Literal["jsonl", "txt", "parquet"]
Compression = Literal["", "gz", "zst"]
TxtDocuments = Literal["file", "line", "blank-line"]
OnError = Literal["skip", "refuse"]
TroubleKind = Literal["broken_json", "not_an_object", "missing_text", "not_a_string", "invalid_utf8", "empty"]

STANDARD_INPUT = "-"
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "txt.zst", "parquet")
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".text": "txt",
    ".parquet": "parquet",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
MAGIC = {b"\x1f\x8b": "gzip data", b"\x28\xb5\x2f\xfd": "Zstandard data", b"PAR1": "a parquet file"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 1 << 18  # of a plain file at once
COMPRESSED_READ_BYTES = 1 << 14  # at once; small, because one read may grow a thousandfold
LARGEST_ZSTD_WINDOW = 1 << 31  # bytes; `zstd --long=31` is the most its tool writes
PARQUET_ROWS = 256  # decoded at once
TEXT_COLUMNS = {"string", "large_string", "string_view", "binary", "large_binary"}  # types of parquet columns
EXAMPLES_PER_KIND = 3


@dataclass(frozen=True)
class Source:
    """One input: a file, standard input (``path`` and ``url`` None), or what ``url`` names for ``fsspec``."""

    path: Path | None
    format: Format
    compression: Compression = ""
    url: str | None = None

    @property
    def name(self) -> str:
        return self.url or ("standard input" if self.path is None else str(self.path))

    @property
    def can_be_read_again(self) -> bool:
        return self.path is not None or self.url is not None

    @property
    def size(self) -> int | None:
        """Bytes on disk, None where they cannot be known before the end."""
        if self.url is not None:
            return remote.details(self.url)["size"]
        return self.path.stat().st_size if self.path is not None and self.path.is_file() else None

    def identity(self) -> list[Any]:
        """[name, bytes, time of change]: what tells whether it is still the same input."""
        if self.url is not None:
            found = remote.details(self.url)
            return [self.name, found["size"], found["version"]]
        if self.path is None:
            return [self.name, None, None]
        try:
            found = self.path.stat()
        except OSError as error:
            raise UserError(self.path, f"cannot read: {error.strerror}", "check the file and the disk") from error
        return [self.name, found.st_size, found.st_mtime_ns]


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in the sources.

    Attributes:
        text_key: the JSON key or parquet column that holds the text.
        txt_documents: what a document is in a text file: the whole ``file``, a ``line``, or what stands between
            ``blank-line``s.
        max_document_bytes: a document larger than this ends the run; it would be in memory several times.
        chunk_bytes: text that one chunk aims at.
    """

    text_key: str = "text"
    txt_documents: TxtDocuments = "file"
    max_document_bytes: int = 64 << 20
    chunk_bytes: int = 512 << 10


@dataclass(frozen=True)
class Chunk:
    """Whole documents, not parsed yet.

    Attributes:
        source: name of the input.
        layout: how documents lie in ``data``: ``jsonl``, ``line`` and ``blank-line`` are one run of bytes;
            ``documents`` is one entry per document, None where a parquet row is null.
        data: the bytes.
        first: number of the first line, or of the first document, counted from 1.
        offset: where ``data`` begins in the (decompressed) source, in bytes.
        consumed: bytes of the input as it lies on the disk that were read for this chunk.
        compressed: offsets count bytes of the decompressed text.
    """

    source: str
    layout: Literal["jsonl", "line", "blank-line", "documents"]
    data: bytes | list[bytes | None]
    first: int = 1
    offset: int = 0
    consumed: int = 0
    compressed: bool = False


class Document(NamedTuple):
    """A usable document: its text, and the same as UTF-8."""

    text: str
    utf8: bytes


class Trouble(NamedTuple):
    """A document that cannot be used: of which kind, where it is, what is wrong with it."""

    kind: TroubleKind
    where: str
    problem: str


@dataclass
class TroubleLog:
    """Counts unusable documents by kind and keeps the first few of each; or refuses the first.

    Attributes:
        on_error: ``refuse`` raises at the first trouble, ``skip`` goes on.
        counts: kind -> documents.
        examples: the first EXAMPLES_PER_KIND troubles of each kind.
    """

    on_error: OnError = "refuse"
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[Trouble] = field(default_factory=list)

    def add(self, trouble: Trouble) -> None:
        """Record one trouble.

        Raises:
            UserError: ``on_error`` is ``refuse``.
        """
        if self.on_error == "refuse":
            raise UserError(
                trouble.where,
                f"{trouble.problem} [{trouble.kind}]",
                "mend the input, or pass --on-error skip to leave such documents out and have them counted",
            )
        if self.counts[trouble.kind] < EXAMPLES_PER_KIND:
            self.examples.append(trouble)
        self.counts[trouble.kind] += 1

    def merge(self, later: TroubleLog) -> None:
        """Take over what was recorded about a later part of the input."""
        for trouble in later.examples:
            if sum(known.kind == trouble.kind for known in self.examples) < EXAMPLES_PER_KIND:
                self.examples.append(trouble)
        self.counts.update(later.counts)


def find_sources(patterns: Iterable[str | Path], format: str | None = None) -> list[Source]:
    """Sources named by ``patterns``, in their order; what one glob or folder matches is sorted by name.

    Args:
        patterns: files, globs (``**`` too), folders (all files in them, at any depth, whose suffix is known and not
            ``.json``) or ``-`` for standard input.
        format: one of FORMATS, for all of them; None tells by the suffix, and takes standard input for jsonl.

    Raises:
        UserError: nothing matches, a suffix is not known, or a file is named twice.
    """
    sources = [source for pattern in patterns for source in _expand(str(pattern), format)]
    seen: set[Path | str | None] = set()
    for source in sources:
        identity = source.path.resolve() if source.path is not None else source.url
        if identity in seen:
            raise UserError(source.name, "named twice: its documents would be doubled", "name each input once")
        seen.add(identity)
    if not sources:
        raise UserError("--input", "no input was named", "give files, globs, folders or - for standard input")
    return sources


def read_chunks(sources: Iterable[Source], options: ReadOptions) -> Iterator[Chunk]:
    """Chunks of all sources, in order.

    Raises:
        UserError: a source cannot be read to its end, or holds a document above ``options.max_document_bytes``.
    """
    for source in sources:
        with _reading(source):
            if source.format == "parquet":
                yield from _parquet_chunks(source, options)
            elif source.format == "txt" and options.txt_documents == "file":
                yield _whole_file(source, options)
            else:
                yield from _line_chunks(source, options)


def parse_chunk(chunk: Chunk, text_key: str = "text") -> Iterator[Document | Trouble]:
    """The documents of ``chunk`` in order, and what cannot be used where it occurs.

    Blank lines in jsonl are no documents; in text they only separate or, line by line, are empty documents.
    """
    if chunk.layout == "jsonl":
        for number, offset, line in _lines(chunk):
            if line.strip():
                yield _parse_json(chunk, number, offset, line, text_key)
    elif chunk.layout == "line":
        for number, offset, line in _lines(chunk):
            yield _decode(_place(chunk, number), chunk, offset, line.removesuffix(b"\r"))
    elif chunk.layout == "blank-line":
        for number, offset, paragraph in _paragraphs(chunk):
            yield _decode(_place(chunk, number), chunk, offset, paragraph)
    else:
        for number, data in enumerate(chunk.data, chunk.first):
            yield _parse_row(chunk, number, data)


def read_documents(sources: Iterable[Source], options: ReadOptions, log: TroubleLog) -> Iterator[Document]:
    """All usable documents in this process; what cannot be used goes to ``log``."""
    for chunk in read_chunks(sources, options):
        for item in parse_chunk(chunk, options.text_key):
            if isinstance(item, Trouble):
                log.add(item)
            else:
                yield item


def _expand(pattern: str, format: str | None) -> Iterator[Source]:
    """Sources that one pattern names."""
    path = Path(pattern)
    if remote.is_url(pattern):
        for url in remote.expand(pattern):
            found = _source(Path(url.partition("::")[0]), format)
            yield Source(None, found.format, found.compression, url)
    elif pattern == STANDARD_INPUT:
        kind, compression = _split_format(format or "jsonl")
        if kind == "parquet":
            raise UserError("standard input", "parquet is read from its end, which a pipe has not", "give the file")
        yield Source(None, kind, compression)
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if _belongs_to_corpus(file, path, format))
        if not found:
            raise UserError(path, "holds no file of a known format", f"known suffixes: {_known_suffixes()}")
        yield from (_source(file, format) for file in found)
    elif path.exists():
        yield _source(path, format)
    else:
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir())
        if not found:
            problem = "the glob matches no file" if glob.has_magic(pattern) else "there is no such file"
            raise UserError(pattern, problem, "check the path; quote globs so that they reach this program")
        yield from (_source(file, format) for file in found)


def _belongs_to_corpus(file: Path, folder: Path, format: str | None) -> bool:
    """Whether a file found in a folder is taken: hidden ones and ``.json``, mostly metadata, must be named."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    known = format is not None or (_format_of(file) is not None and ".json" not in file.suffixes)
    return known and not hidden and file.is_file()


def _source(path: Path, format: str | None) -> Source:
    known = _format_of(path)
    if format is not None:
        kind, compression = _split_format(format)
        return Source(path, kind, compression or COMPRESSIONS.get(path.suffix, ""))
    if known is None:
        raise UserError(
            path, f"cannot tell the format by the suffix {path.suffix!r}", f"pass --format, or use {_known_suffixes()}"
        )
    return Source(path, *known)


def _format_of(path: Path) -> tuple[Format, Compression] | None:
    compression = COMPRESSIONS.get(path.suffix, "")
    kind = SUFFIXES.get((path.with_suffix("") if compression else path).suffix)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def _split_format(format: str) -> tuple[Format, Compression]:
    if format not in FORMATS:
        raise UserError("--format", f"unknown format {format!r}", f"use one of {', '.join(FORMATS)}")
    kind, _, compression = format.partition(".")
    return kind, compression  # type: ignore[return-value]


def _known_suffixes() -> str:
    return f"{' '.join(SUFFIXES)}, and {' '.join(COMPRESSIONS)} after those of text"


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turn what the system refuses while ``source`` is read into a clear error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            source.name, f"cannot read: {error.strerror or error}", "check the file and the disk"
        ) from error


def _blocks(source: Source) -> Iterator[tuple[bytes, int]]:
    """The text of ``source`` in pieces, each with the bytes read from the disk for it."""
    raw = _raw_blocks(source)
    if source.compression == "gz":
        return _decompressed(raw, source, lambda: zlib.decompressobj(wbits=31), zlib.error)
    if source.compression == "zst":
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW)
        return _decompressed(raw, source, decompressor.decompressobj, zstandard.ZstdError)
    return ((block, len(block)) for block in raw)


def _raw_blocks(source: Source) -> Iterator[bytes]:
    size = COMPRESSED_READ_BYTES if source.compression else READ_BYTES
    if source.url is not None:
        with remote.open_to_read(source.url) as file:
            yield from _read_all(file, size)
        return
    if source.path is None:
        yield from _read_all(sys.stdin.buffer, size)
        return
    with open(source.path, "rb") as file:
        read_ahead(file)
        yield from _read_all(file, size)


def _read_all(file: BinaryIO, size: int) -> Iterator[bytes]:
    while block := file.read(size):
        yield block


def _decompressed(
    raw: Iterator[bytes], source: Source, new_member: Callable[[], Any], broken: type[Exception]
) -> Iterator[tuple[bytes, int]]:
    """Decompress gzip members or Zstandard frames, however many follow each other.

    The libraries' file objects take the end of a truncated Zstandard file for its end; this does not.
    """
    member, position = None, 0
    for block in raw:
        rest = block
        while rest:
            member = member or new_member()
            try:
                text = member.decompress(rest)
            except broken as error:
                raise _damaged(source, f"damaged near byte {position}: {error}") from error
            yield text, 0
            rest = member.unused_data if member.eof else b""
            member = None if member.eof else member
        position += len(block)
        yield b"", len(block)
    if member is not None or position == 0:
        raise _damaged(source, f"truncated: it ends after {position} bytes in the middle of the compressed data")


def _damaged(source: Source, problem: str) -> UserError:
    tool = {"gz": "gzip -t", "zst": "zstd -t"}[source.compression]
    return UserError(source.name, problem, f"fetch it again; `{tool}` tells when it is whole")


def _open_text(source: Source) -> tuple[int, Iterator[tuple[bytes, int]]]:
    """(length of the byte order mark, ``_blocks`` without it); refuses what is not text at all."""
    blocks = _blocks(source)
    head, consumed = b"", 0
    for block, size in blocks:
        head, consumed = head + block, consumed + size
        if len(head) >= max(map(len, MAGIC)):
            break
    _refuse_binary(source, head)
    mark = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
    return mark, itertools.chain([(head[mark:], consumed)], blocks)


def _refuse_binary(source: Source, head: bytes) -> None:
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise UserError(
                source.name,
                f"is {what}, but was to be read as {source.format}",
                f"give the file the suffix it deserves, or pass --format with one of {', '.join(FORMATS)}",
            )


def _whole_file(source: Source, options: ReadOptions) -> Chunk:
    parts, total, consumed = [], 0, 0
    mark, blocks = _open_text(source)
    for block, size in blocks:
        parts.append(block)
        total, consumed = total + len(block), consumed + size
        if total > options.max_document_bytes:
            raise _too_large(source, "file", total, options, "split it with --txt-documents line or blank-line, or ")
    data = [b"".join(parts)]
    return Chunk(source.name, "documents", data, 1, mark, consumed, bool(source.compression))


def _line_chunks(source: Source, options: ReadOptions) -> Iterator[Chunk]:
    """Cut a source of lines or paragraphs into chunks of whole ones."""
    layout = "jsonl" if source.format == "jsonl" else options.txt_documents
    last_cut = _last_paragraph_end if layout == "blank-line" else _last_line_end
    offset, blocks = _open_text(source)
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
            raise _too_large(source, f"{what} at line {line} (byte {offset})", len(buffer), options, remedy)
    if buffer or consumed:
        yield chunk(bytes(buffer))


def _last_line_end(buffer: bytearray, searched: int) -> int:
    """Bytes of ``buffer`` up to its last line end, 0 if there is none; none is in the first ``searched``."""
    return buffer.rfind(b"\n", searched) + 1


def _last_paragraph_end(buffer: bytearray, searched: int) -> int:
    """Bytes of ``buffer`` up to the end of its last blank line, 0 if there is none."""
    end = buffer.rfind(b"\n")
    lowest = max(0, buffer.rfind(b"\n", 0, searched))  # a blank line may have begun in the searched part
    while end > lowest:
        start = buffer.rfind(b"\n", 0, end)
        if start >= 0 and not buffer[start + 1 : end].strip():
            return end + 1
        end = start
    return 0


def _too_large(source: Source, what: str, size: int, options: ReadOptions, remedy: str) -> UserError:
    return UserError(
        source.name,
        f"the {what} has {size >> 20} MiB or more; documents may have {options.max_document_bytes >> 20} MiB",
        f"{remedy}raise --max-document-mib",
    )


def _parquet_chunks(source: Source, options: ReadOptions) -> Iterator[Chunk]:
    import pyarrow
    from pyarrow import parquet

    try:
        with (
            contextlib.nullcontext(source.path) if source.url is None else remote.open_to_read(source.url) as opened,
            parquet.ParquetFile(opened, buffer_size=READ_BYTES, page_checksum_verification=True) as file,
        ):
            _check_column(source, file.schema_arrow, options.text_key)
            yield from _row_chunks(source, file, options)
    except pyarrow.ArrowException as error:
        raise UserError(source.name, f"not a whole parquet file: {error}", "fetch or write it again") from error


def _check_column(source: Source, schema: Any, text_key: str) -> None:
    """Refuse a parquet file whose text column is missing or holds no text."""
    from pyarrow import types

    if text_key not in schema.names:
        raise UserError(
            source.name,
            f"has no column {text_key!r}, only {', '.join(schema.names)}",
            "name the column with --text-key",
        )
    kind = schema.field(text_key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if str(kind) not in TEXT_COLUMNS:
        raise UserError(source.name, f"column {text_key!r} holds {kind}, not text", "name the column with --text-key")


def _row_chunks(source: Source, file: Any, options: ReadOptions) -> Iterator[Chunk]:
    rows: list[bytes | None] = []
    first, size = 1, 0
    share = (source.size or 0) / max(1, file.metadata.num_rows)  # bytes on disk per row, for the progress display
    for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[options.text_key], use_threads=False):
        for row in _as_bytes(batch.column(0)):
            if row is not None and len(row) > options.max_document_bytes:
                raise _too_large(source, f"document {first + len(rows)}", len(row), options, "split it, or ")
            rows.append(row)
            size += len(row or b"")
            if size >= options.chunk_bytes:
                yield Chunk(source.name, "documents", rows, first, consumed=round(share * len(rows)))
                rows, first, size = [], first + len(rows), 0
    if rows:
        yield Chunk(source.name, "documents", rows, first, consumed=round(share * len(rows)))


def _as_bytes(column: Any) -> list[bytes | None]:
    """Rows as bytes: their UTF-8 is checked with that of everything else, and reported by row."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()


def _lines(chunk: Chunk) -> Iterator[tuple[int, int, bytes]]:
    """(line number, offset in the source, line without its end) of each line."""
    lines = chunk.data.split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line end is no line
    offset = chunk.offset
    for number, line in enumerate(lines, chunk.first):
        yield number, offset, line
        offset += len(line) + 1


def _paragraphs(chunk: Chunk) -> Iterator[tuple[int, int, bytes]]:
    """(number of the first line, offset, text) of each run of lines that are not blank."""
    run: list[bytes] = []
    start, start_offset = 0, 0
    for number, offset, line in _lines(chunk):
        if line.strip():
            if not run:
                start, start_offset = number, offset
            run.append(line.removesuffix(b"\r"))
        elif run:
            yield start, start_offset, b"\n".join(run)
            run = []
    if run:
        yield start, start_offset, b"\n".join(run)


def _parse_json(chunk: Chunk, number: int, offset: int, line: bytes, text_key: str) -> Document | Trouble:
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        return _invalid_utf8(_place(chunk, number), chunk, offset, line, error)
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        byte = offset + len(decoded[: error.pos].encode())
        return Trouble("broken_json", _at_byte(_place(chunk, number), chunk, byte), f"broken JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        return Trouble("broken_json", _at_byte(_place(chunk, number), chunk, offset), f"cannot parse JSON: {error}")
    where = _at_byte(_place(chunk, number), chunk, offset)
    if not isinstance(record, dict):
        return Trouble("not_an_object", where, f"a JSON {_json_type(record)} where an object is expected")
    if text_key not in record:
        keys = ", ".join(list(record)[:8]) or "none at all"
        return Trouble("missing_text", where, f"has no key {text_key!r}; keys are {keys}")
    text = record[text_key]
    if not isinstance(text, str):
        return Trouble("not_a_string", where, f"{text_key!r} is a JSON {_json_type(text)}, not a string")
    return _usable(where, text)


def _parse_row(chunk: Chunk, number: int, data: bytes | None) -> Document | Trouble:
    many = len(chunk.data) > 1 or chunk.first > 1
    place = f"{chunk.source}: document {number}" if many else chunk.source
    if data is None:
        return Trouble("not_a_string", place, "the text is null")
    return _decode(place, chunk, chunk.offset, data)


def _decode(place: str, chunk: Chunk, offset: int, data: bytes) -> Document | Trouble:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return _invalid_utf8(place, chunk, offset, data, error)
    return Document(text, data) if text.strip() else Trouble("empty", _at_byte(place, chunk, offset), "is empty")


def _usable(where: str, text: str) -> Document | Trouble:
    """The document ``text``, which came through JSON and may hold what UTF-8 cannot."""
    if not text.strip():
        return Trouble("empty", where, "is empty")
    try:
        return Document(text, text.encode())
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return Trouble("invalid_utf8", where, f"character {error.start} is half of a surrogate pair (\\u{code:04x})")


def _invalid_utf8(place: str, chunk: Chunk, offset: int, data: bytes, error: UnicodeDecodeError) -> Trouble:
    byte = data[error.start]
    return Trouble(
        "invalid_utf8", _at_byte(place, chunk, offset + error.start), f"byte 0x{byte:02x} is not valid UTF-8"
    )


def _place(chunk: Chunk, line: int) -> str:
    return f"{chunk.source}:{line}"


def _at_byte(place: str, chunk: Chunk, byte: int) -> str:
    return f"{place} (byte {byte}{' of the decompressed text' if chunk.compressed else ''})"


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "string", dict: "object", list: "array", int: "number", float: "number"}
    return names[type(value)]
