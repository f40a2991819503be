"""Recognise the real format of a file by its first bytes, where its name says another, and name the remedy."""

from __future__ import annotations

import codecs
import json
import re
import shlex
import unicodedata
from pathlib import PurePath

from megachiar.data.inputs.source import COMPRESSIONS, FORMATS, Compression, Source
from megachiar.errors import UserError

HEAD_BYTES = 1 << 12  # enough to recognise the format of a file
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
COMPRESSION_MAGIC: dict[Compression, bytes] = {
    "gz": b"\x1f\x8b",
    "zst": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ\x00",
    "bz2": b"BZh",
}
SKIPPABLE_FRAME = b"\x2a\x4d\x18"
"""Bytes after the first byte of a Zstandard frame without text, as pzstd writes it."""
COMPRESSION_NAMES: dict[Compression, str] = {"gz": "gzip", "zst": "Zstandard", "xz": "xz", "bz2": "bzip2"}
MAGIC = {
    **{magic: f"{COMPRESSION_NAMES[kind]} data" for kind, magic in COMPRESSION_MAGIC.items() if kind != "bz2"},
    b"PAR1": "a parquet file",
    LFS_POINTER: "a pointer of git-LFS, not the file itself",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "LZ4 data",
    b"ARROW1\x00\x00": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"%PDF-": "a PDF",
    b"SQLite format 3\x00": "an SQLite database",
}
ANY_MAGIC = re.compile(b"|".join(map(re.escape, MAGIC)))
BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")  # BZh alone may be a word of a text
WEB_PAGE = re.compile(rb"\s*<(!doctype\s+html|html)\b", re.IGNORECASE)
ENCODING_MARKS = {  # the longer first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
ANY_MARK = re.compile(b"|".join(map(re.escape, ENCODING_MARKS)))
LEAST_ZEROS = 0.3  # share of UTF-16's high bytes that are zero where the text is mostly ASCII
MOST_STRANGE = 0.02  # share of control and unassigned characters in text of another language
SHORTEST_GUESS = 8  # bytes; the encoding of fewer is not guessed
SHORTEST_STRANGE = 64  # bytes; the encoding of fewer is not guessed where they are mostly not ASCII
UNPACK: dict[Compression, str] = {"gz": "gzip -dc", "zst": "zstd -dc", "xz": "xz -dc", "bz2": "bzip2 -dc"}


def describe(head: bytes) -> str | None:
    """Name the data that begins with ``head``, such as ``"gzip data"``; None for plain text and unknown data."""
    if found := ANY_MAGIC.match(head):
        return MAGIC[found[0]]
    if encoding := encoding_of(head):
        return f"{encoding} text"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if BZIP2.match(head):
        return f"{COMPRESSION_NAMES['bz2']} data"
    if WEB_PAGE.match(head):
        return "a web page"
    return None


def encoding_of(head: bytes) -> str | None:
    """Return ``"UTF-16"`` or ``"UTF-32"`` by the byte order mark, UTF-16LE or UTF-16BE by zero bytes, or None."""
    if found := ANY_MARK.match(head):
        return ENCODING_MARKS[found[0]]
    if b"\0" not in head or len(head) < SHORTEST_GUESS:
        return None
    head = head[: len(head) // 2 * 2]
    zeros = {"UTF-16LE": head[1::2].count(0), "UTF-16BE": head[::2].count(0)}
    likely = max(zeros, key=zeros.__getitem__)
    if zeros[likely] >= LEAST_ZEROS * len(head) / 2 and min(zeros.values()) == 0:
        return likely
    if len(head) < SHORTEST_STRANGE or _decodes(head, "utf-8"):
        return None
    return likely if _decodes(head, likely) else None


def _decodes(head: bytes, encoding: str) -> bool:
    """Return whether ``head``, which may end within a character, is text in ``encoding`` and not just decodes."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    strange = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") and not c.isspace() for c in text)
    return encoding == "utf-8" or strange <= MOST_STRANGE * len(text)


def looks_like_text(head: bytes) -> bool:
    """Return whether ``head`` may be text in some encoding of bytes: its only control characters are whitespace."""
    return not any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head)


def refuse_pointer(where: object, head: bytes) -> None:
    """Refuse a file that git-LFS has not fetched.

    Args:
        where: the file, for the error.
        head: its first bytes.

    Raises:
        UserError: ``head`` is the beginning of a pointer.
    """
    if head.startswith(LFS_POINTER):
        raise UserError(where, f"is {MAGIC[LFS_POINTER]}", "fetch the file: run `git lfs pull` in its folder")


def refuse_other_compression(source: Source, head: bytes) -> None:
    """Refuse a file that does not have the compression that its name says.

    Args:
        source: a compressed source.
        head: its first bytes, as they are on the disk.

    Raises:
        UserError: the message names the real format of the file.
    """
    if begins_compressed(source.compression, head):
        return
    refuse_pointer(source.name, head)
    what = describe(head) or ("plain text" if looks_like_text(head) else f"something that begins with {head[:8]!r}")
    raise UserError(
        source.name, f"is not {COMPRESSION_NAMES[source.compression]} data, but {what}", _other_name(source, what)
    )


def begins_compressed(kind: Compression, head: bytes) -> bool:
    """Return whether ``head``, as far as it goes, may begin data of this compression."""
    if head.startswith(COMPRESSION_MAGIC[kind][: len(head)]):
        return True
    return kind == "zst" and head[0] & 0xF0 == 0x50 and SKIPPABLE_FRAME.startswith(head[1:4])


def _other_name(source: Source, what: str) -> str:
    """Return the remedy for a file that is ``what``, under the name of another compression."""
    suffixes = {f"{COMPRESSION_NAMES[kind]} data": suffix for suffix, kind in COMPRESSIONS.items()}
    known = {"plain text": "", **suffixes}.get(what)
    if known is None:
        return "fetch it again: what came may be a message of the server"
    if source.path is None:
        return f"pass --format {source.format}{known}"
    return f"put {known} in place of .{source.compression}" if known else f"take .{source.compression} off its name"


def refuse_what_is_no_text(source: Source, head: bytes) -> None:
    """Refuse a source of text or JSON lines that holds something else.

    Args:
        source: the source.
        head: its first bytes, decompressed.

    Raises:
        UserError: the message names the real format of the file, and a command that converts it where there is one.
    """
    if not head:
        return
    what = describe(head)
    if what is None or (what == "a web page" and source.format == "txt"):
        if source.format == "jsonl":
            refuse_other_json(source, head.removeprefix(codecs.BOM_UTF8))
        return
    refuse_pointer(source.name, head)
    if what.endswith(" text"):
        encoding = what.removesuffix(" text")
        command = converting(source, f"iconv -f {encoding} -t UTF-8", f".utf8{_inner_suffix(source)}")
        raise UserError(source.name, f"is {encoding} text, but text must be UTF-8", f"convert it: `{command}`")
    raise UserError(
        source.name,
        f"is {what}, but was to be read as {source.format}",
        f"give the file the suffix it deserves, or pass --format with one of {', '.join(FORMATS)}",
    )


def refuse_other_json(source: Source, head: bytes) -> None:
    """Refuse JSON that is neither an array nor has one object on each line.

    Raises:
        UserError: the message names the command that converts it.
    """
    if json_layout(head) != "pretty-printed":
        return
    problem, program = "is pretty-printed JSON, objects of several lines each, not an object a line", "jq -c ."
    raise UserError(source.name, problem, f"convert it: `{converting(source, program, '.lines.jsonl')}`")


def json_layout(head: bytes) -> str:
    """Return the layout of JSON that begins with ``head``: "lines", "array", "pretty-printed" or "other".

    A first line that is broken by itself counts as a line: it is reported with its number.
    """
    head = head.lstrip()
    line, _, rest = head.partition(b"\n")
    line, rest = line.rstrip(), rest.lstrip()
    if head.startswith(b"["):
        return "lines" if rest and _parses(line) else "array" if re.match(rb"\[\s*[\[{]", head) else "other"
    if not head.startswith(b"{"):
        return "other"
    if not rest or line.endswith(b"}"):
        return "lines"
    if re.match(rb"\{\s*\n\s*(\"|\})", head) or _parses_over_lines(head):
        return "pretty-printed"
    return "lines"


def _parses(line: bytes) -> bool:
    """Return whether ``line`` is JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parses_over_lines(head: bytes) -> bool:
    """Return whether the first JSON value of ``head`` is whole and has line ends inside."""
    text = head.decode(errors="ignore")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def converting(source: Source, program: str, suffix: str) -> str:
    """Return the shell command that sends the text of ``source`` through ``program`` to a file beside it."""
    name = "FILE" if source.path is None else str(source.path)
    stem = name.removesuffix(f".{source.compression}") if source.compression else name
    output = shlex.quote(stem.removesuffix(PurePath(stem).suffix) + suffix)
    if source.compression:
        return f"{UNPACK[source.compression]} {shlex.quote(name)} | {program} > {output}"
    return f"{program} {shlex.quote(name)} > {output}"


def _inner_suffix(source: Source) -> str:
    """Return the suffix of the file before compression, such as ``.txt`` of ``a.txt.gz``."""
    if source.path is None:
        return f".{source.format}"
    name = source.path.name
    return PurePath(name.removesuffix(f".{source.compression}") if source.compression else name).suffix
