"""Find the inputs that a command line names: files, globs, folders, URLs and standard input."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megachiar.data.inputs import remote
from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.folder_files import FoundFiles, folder_files
from megachiar.data.inputs.folder_walk import LeftOut, walk
from megachiar.data.inputs.source import COLUMNAR, STANDARD_INPUT, Source, make_source, split_format
from megachiar.errors import UserError, disk_errors


@dataclass
class Inputs:
    """Hold the corpus that a command line names: all sources in order, and the files of each folder or glob."""

    sources: list[Source] = field(default_factory=list)
    found: list[FoundFiles] = field(default_factory=list)


def find_sources(patterns: Iterable[str | Path], format: str | None = None) -> list[Source]:
    """Return the sources that ``find_inputs`` finds."""
    return find_inputs(patterns, format).sources


def find_inputs(
    patterns: Iterable[str | Path], format: str | None = None, text_keys: Sequence[str] = ReadOptions().text_keys
) -> Inputs:
    """Find the inputs named by ``patterns``, in their order; the files of a glob or folder are sorted by name.

    Args:
        patterns: files, globs (``**`` too), folders or ``-`` for standard input.
        format: one of FORMATS, for all inputs and all files of a folder; None goes by the suffix of each file, and
            takes standard input for jsonl.
        text_keys: the keys of the text; a ``.json`` file of a folder is data only if it has one of them.

    Raises:
        UserError: nothing matches, a suffix is not known, a file is named twice, or a folder holds text data that
            cannot be read.
    """
    inputs = Inputs()
    for pattern in map(str, patterns):
        found = _expand(pattern, format, text_keys)
        inputs.sources += found.sources
        if found.left_out or os.path.isdir(pattern):
            inputs.found.append(found)
    if not inputs.sources:
        raise UserError("--input", "no input was named", "give files, globs, folders or - for standard input")
    _refuse_duplicates(inputs.sources)
    return inputs


def same_file(path: Path, sources: Iterable[Source]) -> bool:
    """Return whether ``path`` is one of the files that are read.

    Raises:
        UserError: the status of one of them cannot be read.
    """
    try:
        found = os.stat(path)
    except OSError:  # it does not exist, so that no input is the same file
        return False
    for source in sources:
        if source.path is not None:
            with disk_errors(source.name, "read"):
                if os.path.samestat(found, os.stat(source.path)):
                    return True
    return False


def _expand(pattern: str, format: str | None, text_keys: Sequence[str]) -> FoundFiles:
    """Find the files that one pattern names."""
    path = Path(pattern)
    if remote.is_url(pattern):
        return FoundFiles(pattern, list(_remote_sources(pattern, format)))
    if pattern == STANDARD_INPUT:
        kind, compression = split_format(format or "jsonl")
        if kind in COLUMNAR:
            raise UserError("standard input", f"{kind} is read from its end, which a pipe has not", "give the file")
        return FoundFiles(pattern, [Source(None, kind, compression)])
    with disk_errors(pattern, "read"):
        if path.is_dir():
            return folder_files(path, format, text_keys)
        if path.exists():
            return FoundFiles(pattern, [make_source(path, format)])
        return _glob_files(pattern, format)


def _remote_sources(pattern: str, format: str | None) -> Iterator[Source]:
    """Yield the remote files that a URL matches."""
    for url in remote.expand(pattern):
        found = make_source(Path(url.partition("::")[0]), format)
        yield Source(None, found.format, found.compression, url)


def _glob_files(pattern: str, format: str | None) -> FoundFiles:
    """Find the files that a glob matches."""
    names, folders = _matches(pattern)
    if not names:
        problem = "the glob matches no file" if glob.has_magic(pattern) else "there is no such file"
        raise UserError(pattern, problem, "check the path; quote globs so that they reach this program")
    left_out = [LeftOut(folder, "a folder, which a glob does not read") for folder in folders]
    return FoundFiles(pattern, [make_source(Path(name), format) for name in names], left_out)


def _matches(pattern: str) -> tuple[list[str], list[str]]:
    """Return the files that a glob matches, and the folders that it matches and does not enter, each sorted."""
    parts = pattern.split("/")
    if "**" not in parts:
        matched: tuple[list[str], list[str]] = [], []  # files, folders
        for name in sorted(glob.glob(pattern), key=_path_parts):
            matched[os.path.isdir(name)].append(name)
        return matched
    first = parts.index("**")
    base, rest = "/".join(parts[:first]) + "/" * (first > 0), parts[first:]
    files = []
    for root in glob.glob(base) if base else [""]:
        found, _ = walk(root or ".", enters_hidden=any(part.startswith(".") for part in rest))
        files += [root + name for name in found if _fits(name.split("/"), rest)]
    return sorted(files, key=_path_parts), []


def _fits(names: list[str], patterns: list[str]) -> bool:
    """Return whether the parts of a path match those of a glob.

    ``**`` matches any number of parts; only a part that begins with a dot matches a name that does.
    """
    if not patterns:
        return not names
    if patterns[0] == "**":
        visible = next((n for n, name in enumerate(names) if name.startswith(".")), len(names))
        return any(_fits(names[n:], patterns[1:]) for n in range(visible + 1))
    hidden = bool(names) and names[0].startswith(".") and not patterns[0].startswith(".")
    return bool(names) and not hidden and fnmatch.fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def _path_parts(name: str) -> list[str]:
    """Return the parts of a path; sorted by them, paths come folder after folder."""
    return name.split("/")


def _refuse_duplicates(sources: list[Source]) -> None:
    """Refuse a file that is named twice, through links too."""
    real = _make_real()
    seen: set[str | None] = set()
    for source in sources:
        identity = real(str(source.path)) if source.path is not None else source.url
        if identity in seen:
            raise UserError(source.name, "is named twice: its documents would be doubled", "name each input once")
        seen.add(identity)


def _make_real() -> Callable[[str], str]:
    """Return a faster ``os.path.realpath``, which resolves each folder once."""
    folders: dict[str, str] = {}

    def real(path: str) -> str:
        if os.path.islink(path):
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.join(folders[folder], name)

    return real
