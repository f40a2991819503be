"""Inputs that are not files here: object stores, web servers and archives, through ``fsspec``.

``s3://bucket/*.jsonl.zst`` needs ``s3fs``, ``gs://`` needs ``gcsfs``, ``https://`` needs ``aiohttp``; fsspec itself
says what is missing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, TypedDict

from megachiar.errors import UserError

READ_AHEAD_BYTES = 8 << 20  # fetched at once


class Details(TypedDict):
    """Of a remote file: bytes, and whatever tells that it was replaced (ETag, time of change), None without either."""

    size: int | None
    version: str | None


def is_url(text: str) -> bool:
    """Whether ``text`` names something for fsspec, such as ``s3://bucket/a.jsonl`` or ``zip://a.txt::b.zip``."""
    return re.match(r"[a-z][a-z0-9+.-]+://", text) is not None


def expand(url: str) -> list[str]:
    """The URLs of the files that ``url``, which may hold a glob, matches, sorted.

    Raises:
        UserError: none, or the store cannot be reached.
    """
    system, path = _open_system(url)
    try:
        found = sorted(name for name in system.glob(path) if not system.isdir(name))
    except Exception as error:  # every store raises its own
        raise _unreachable(url, error) from error
    if not found:
        raise UserError(url, "matches no file", "check the URL and your right to read it")
    head, chain, tail = url.partition("::")
    scheme = head.partition("://")[0]
    return [f"{scheme}://{str(name).removeprefix(f'{scheme}://')}{chain}{tail}" for name in found]


def details(url: str) -> Details:
    """Size and version of the file at ``url``.

    Raises:
        UserError: it is not there or cannot be reached.
    """
    system, path = _open_system(url)
    try:
        found: dict[str, Any] = system.info(path)
    except Exception as error:
        raise _unreachable(url, error) from error
    version = next((found[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated") if found.get(key)), None)
    return {"size": found.get("size"), "version": None if version is None else str(version)}


@contextlib.contextmanager
def open_to_read(url: str) -> Iterator[BinaryIO]:
    """The file at ``url``, read ahead in large blocks.

    Raises:
        UserError: it is not there or cannot be reached.
    """
    system, path = _open_system(url)  # an archive closes with its last reference: this one
    try:
        file = system.open(path, "rb", block_size=READ_AHEAD_BYTES)
    except Exception as error:
        raise _unreachable(url, error) from error
    with file:
        yield file


def _open_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UserError(url, "needs fsspec, which is not installed", "pip install 'megachiar[remote]'") from error
    try:
        return url_to_fs(url)
    except Exception as error:  # an unknown scheme, a missing package of that store, no such archive
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> UserError:
    return UserError(url, f"cannot be read: {error}", "check the URL, your credentials and the store's package")
