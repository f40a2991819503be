"""Read inputs from object stores, web servers and archives, through ``fsspec``.

``s3://bucket/*.jsonl.zst`` needs ``s3fs``, ``gs://`` needs ``gcsfs``, ``https://`` needs ``aiohttp``; fsspec itself
names a missing package.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, TypedDict

from megachiar.errors import UserError

READ_AHEAD_BYTES = 8 << 20  # that are fetched at once


class Details(TypedDict):
    """Hold the bytes of a remote file, and its ETag or time of change, which differs after the file is replaced.

    Either is None where the store does not say it.
    """

    size: int | None
    version: str | None


def is_url(text: str) -> bool:
    """Return whether ``text`` is a URL for fsspec, such as ``s3://bucket/a.jsonl`` or ``zip://a.txt::b.zip``."""
    return re.match(r"[a-z][a-z0-9+.-]+://", text) is not None


def expand(url: str) -> list[str]:
    """Return the URLs of the files that ``url``, which may hold a glob, matches, sorted.

    Raises:
        UserError: no file matches, or the store cannot be reached.
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
    """Return size and version of the file at ``url``.

    Raises:
        UserError: the file does not exist or cannot be reached.
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
    """Open the file at ``url``, which is read ahead in large blocks.

    Raises:
        UserError: the file does not exist or cannot be reached.
    """
    system, path = _open_system(url)  # an archive closes with its last reference: this one
    try:
        file = system.open(path, "rb", block_size=READ_AHEAD_BYTES)
    except Exception as error:
        raise _unreachable(url, error) from error
    with file:
        yield file


def _open_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of ``url``, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UserError(url, "needs fsspec, which is not installed", "pip install 'megachiar[remote]'") from error
    try:
        return url_to_fs(url)
    except Exception as error:  # an unknown scheme, a missing package of that store, no such archive
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> UserError:
    """Return the error for a URL that a store's library could not read."""
    return UserError(url, f"cannot be read: {error}", "check the URL, your credentials and the store's package")
