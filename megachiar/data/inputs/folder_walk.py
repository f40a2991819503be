"""List all files of a folder, through links too, without going round in a loop of links."""

from __future__ import annotations

import os
from collections import deque
from typing import NamedTuple

from megachiar.errors import disk_errors


class LeftOut(NamedTuple):
    """Name a file or folder that is not read, and say why."""

    name: str
    reason: str


def walk(root: str, enters_hidden: bool = False) -> tuple[list[str], list[LeftOut]]:
    """List the files of ``root`` and of all folders in it.

    Links to folders are followed after all real folders. Each folder is entered once: a link to a folder that was
    entered before, or to one that holds the link, is left out.

    Args:
        root: a folder.
        enters_hidden: take files and folders whose names begin with a dot too.

    Returns:
        The files as paths below ``root``, sorted folder after folder, and the files and folders left out.

    Raises:
        UserError: a folder cannot be read.
    """
    files: list[str] = []
    left_out: list[LeftOut] = []
    real: deque[str] = deque([""])
    links: deque[str] = deque()
    seen: set[tuple[int, int]] = set()
    while real or links:
        is_link = not real
        folder = (real or links).popleft()
        with disk_errors(os.path.join(root, folder), "read"):
            found = os.stat(os.path.join(root, folder))
            if (found.st_dev, found.st_ino) in seen or (is_link and _leads_up(root, folder)):
                left_out.append(LeftOut(folder.rstrip("/"), "a link to a folder that is read already or leads up"))
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.name.startswith(".") and not enters_hidden:
                        left_out.append(LeftOut(name, "hidden"))
                    elif _is_folder(entry):
                        (links if entry.is_symlink() else real).append(name + "/")
                    elif _is_file(entry):
                        files.append(name)
                    else:
                        broken = entry.is_symlink() and not os.path.exists(entry.path)
                        left_out.append(LeftOut(name, "a broken link" if broken else "not a file"))
        if not real:
            links = deque(sorted(links))
    files.sort(key=lambda name: name.split("/"))
    left_out.sort()
    return files, left_out


def _leads_up(root: str, link: str) -> bool:
    """Return whether a link leads to a folder that ``root`` is in."""
    target = os.path.realpath(os.path.join(root, link))
    return os.path.commonpath([target, os.path.realpath(root)]) == target


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether ``entry`` is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether ``entry`` is a file or a link to one."""
    try:
        return entry.is_file()
    except OSError:
        return False
