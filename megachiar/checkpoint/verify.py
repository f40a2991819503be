"""Compare the files of a checkpoint with the checksums that its record has.

A checkpoint is whole if ``find_damage`` reports nothing, every listed file has its checksum, the config is one and the
headers of the tensors can be read. Every file is read once. The ranks of a run share the files out among themselves
(``training/start.py``); a command that runs alone reads them all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megachiar.checkpoint.checksums import checksum_of_file
from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState, read_state
from megachiar.checkpoint.sharded_tensors import ShardReader
from megachiar.config import load_config
from megachiar.errors import UserError
from megachiar.progress import ByteProgress

_THREADS = 4  # files that one process reads at once
Verify = Callable[[Path], str | None]
"""Returns what is wrong with a checkpoint, of which ``find_damage`` reports nothing; None if it is whole."""


def find_damaged_file(
    checkpoint: Path, state: CheckpointState, names: Sequence[str], show_progress: bool = False
) -> str | None:
    """Return which of the files ``names`` does not have the content that was written; None if each has.

    Files of a checkpoint without checksums (version 3) count as whole.

    Args:
        checkpoint: its folder.
        state: its record.
        names: of the files to read.
        show_progress: show share, rate and time left on standard error.
    """
    recorded = state.checksums
    if recorded is None:
        return None
    if not show_progress:
        return _first_damage(checkpoint, recorded, names, lambda size: None)
    lock = threading.Lock()
    with ByteProgress(f"verifying {checkpoint.name}", sum(state.files[name] for name in names)) as progress:

        def advance(size: int) -> None:
            with lock:  # several threads read
                progress.advance(size)

        return _first_damage(checkpoint, recorded, names, advance)


def _first_damage(
    checkpoint: Path, recorded: Mapping[str, str], names: Sequence[str], on_bytes: Callable[[int], None]
) -> str | None:
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda name: _why_altered(checkpoint / name, recorded[name], on_bytes), names)
        return next((f"{name} {why}" for name, why in zip(names, problems, strict=True) if why), None)


def _why_altered(path: Path, recorded: str, on_bytes: Callable[[int], None]) -> str | None:
    try:
        found = checksum_of_file(path, on_bytes)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None if found == recorded else f"was altered: it has checksum {found}, but {recorded} was written"


def find_unreadable(checkpoint: Path, state: CheckpointState) -> str | None:
    """Return why config or tensors of a checkpoint cannot be read, whatever their checksums are; None if they can."""
    try:
        load_config(checkpoint / CONFIG_FILE)
    except (UserError, RecursionError, ValueError, OSError) as error:
        return f"{CONFIG_FILE} cannot be read: {_reason(error)}"
    try:
        ShardReader(checkpoint, state.tensor_files)
    except UserError as error:
        return f"{Path(error.where).name} {error.problem}"
    return None


def share_of_files(state: CheckpointState, rank: int, ranks: int) -> list[str]:
    """Return the names of the files that ``rank`` of ``ranks`` verifies; together they verify each file once."""
    by_size = sorted(state.files, key=lambda name: (-state.files[name], name))
    return by_size[rank::ranks]


def verify_alone(checkpoint: Path) -> str | None:
    """Verify the files of a checkpoint of which ``find_damage`` reports nothing, and show progress; see ``Verify``."""
    state = read_state(checkpoint)
    names = share_of_files(state, 0, 1)
    return find_damaged_file(checkpoint, state, names, show_progress=True) or find_unreadable(checkpoint, state)


def _reason(error: Exception) -> str:
    """Return the first two lines of an error's message, without its remedies."""
    text = error.problem if isinstance(error, UserError) else str(error)
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("remedy:")]
    return ": ".join(lines[:2]) or type(error).__name__
