"""Cut a file that is one array of JSON into its elements, without reading it whole.

Only the ends of elements are found here. Their bytes are decoded as Latin-1, which has a character for each byte.
JSON's own signs are ASCII, so that places in the text are places in the file whatever strings hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from megachiar.data.inputs.documents import Chunk, ReadOptions
from megachiar.data.inputs.source import Source
from megachiar.data.inputs.text_errors import too_large
from megachiar.errors import UserError

DECODER = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)  # a worker parses elements again, strictly
SPACE = re.compile(r"[ \t\n\r]*")
CUT_OFF = 16  # characters before the end of the text, where an error may mean that the rest is still to be read


def array_chunks(
    source: Source, offset: int, blocks: Iterator[tuple[bytes, int]], options: ReadOptions
) -> Iterator[Chunk]:
    """Yield the elements of an array in chunks of the layout ``elements``.

    Args:
        source: the source that is read.
        offset: where the text begins in it, in bytes.
        blocks: blocks of the text, each with the bytes that were read from the disk for it.
        options: how large chunks and documents may be.

    Raises:
        UserError: the array is broken or cut off, or other text follows it, or an element is too large.
    """
    array = _Array(source, offset, blocks, options)
    rows: list[bytes] = []
    places: list[tuple[int, int]] = []
    first, size = 1, 0

    def chunk() -> Chunk:
        consumed, is_compressed = array.take_consumed(), bool(source.compression)
        return Chunk(source.name, "elements", b"", first, 0, consumed, is_compressed, rows, places=places)

    for byte, element in array.elements():
        rows.append(element)
        places.append((0, byte))
        size += len(element)
        if size >= options.chunk_bytes:
            yield chunk()
            first, rows, places, size = first + len(rows), [], [], 0
    yield chunk()


class _Array:
    """Read an array of JSON from its blocks; the arguments are those of ``array_chunks``."""

    def __init__(self, source: Source, offset: int, blocks: Iterator[tuple[bytes, int]], options: ReadOptions):
        self._source, self._blocks, self._options = source, blocks, options
        self._text, self._at, self._begin = "", 0, offset  # what is read, the place in it, its first byte in the source
        self._is_ended = False
        self._consumed = 0

    def take_consumed(self) -> int:
        """Return the bytes that were read from the disk since the last call."""
        consumed, self._consumed = self._consumed, 0
        return consumed

    def elements(self) -> Iterator[tuple[int, bytes]]:
        """Yield the byte where each element begins, and its bytes."""
        self._next_sign()  # the bracket, by which the array was recognised
        self._at += 1
        if self._next_sign() == "]":
            return self._end()
        while True:
            end = self._element_end()
            yield self._begin + self._at, self._text[self._at : end].encode("latin-1")
            self._at = end
            sign = self._next_sign()
            if sign == "]":
                return self._end()
            if sign != ",":
                raise self._broken(self._at, f"{sign!r} stands where , or ] is expected" if sign else "it is cut off")
            self._at += 1
            self._next_sign()

    def _end(self) -> None:
        """Check that nothing follows the array."""
        self._at += 1
        if self._next_sign():
            raise self._broken(self._at, "other text follows the array")

    def _next_sign(self) -> str:
        """Go on to the next character that is no whitespace and return it; the text is empty at the end."""
        while True:
            found = SPACE.match(self._text, self._at)
            assert found is not None, "it matches nothing too"
            self._at = found.end()
            if self._at < len(self._text) or not self._read_more():
                return self._text[self._at : self._at + 1]

    def _element_end(self) -> int:
        """Return the place after the element that begins here."""
        while True:
            place = self._at
            try:
                _, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                place = error.pos
                is_cut_off = error.msg.startswith("Unterminated string") or place >= len(self._text) - CUT_OFF
                if not is_cut_off or self._is_ended:
                    is_whole = place < len(self._text.rstrip()) and not error.msg.startswith("Unterminated")
                    raise self._broken(place, error.msg if is_whole else "it is cut off") from error
            except RecursionError as error:
                raise self._broken(place, "it is nested without end") from error
            else:
                if end < len(self._text) or self._is_ended:  # else a number may go on
                    return end
            if len(self._text) - self._at > self._options.max_document_bytes:
                where = f"element at byte {self._begin + self._at}"
                raise too_large(self._source, where, len(self._text) - self._at, self._options, "split it, or ")
            self._read_more()

    def _read_more(self) -> bool:
        """Read at least as much again as is there; return whether there was anything."""
        rest = self._text[self._at :]
        parts, wanted = [rest], max(len(rest), self._options.chunk_bytes)
        for block, consumed in self._blocks:
            self._consumed += consumed
            parts.append(block.decode("latin-1"))
            wanted -= len(block)
            if wanted <= 0:
                break
        else:
            self._is_ended = True
        self._begin, self._at, self._text = self._begin + self._at, 0, "".join(parts)
        return len(self._text) > len(rest)

    def _broken(self, place: int, problem: str) -> UserError:
        """Return the error for a place of the text, after which no element can be found."""
        of_text = " of the decompressed text" if self._source.compression else ""
        where = f"{self._source.name} (byte {self._begin + place}{of_text})"
        remedy = "mend the file or fetch it again; `jq empty` tells when it is whole"
        return UserError(where, f"broken JSON array: {problem}", remedy)
