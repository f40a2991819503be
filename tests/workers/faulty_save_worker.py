"""Train on one rank whose disk is slow, or refuses to be written, when a checkpoint is saved.

    python faulty_save_worker.py JSON ARGUMENTS_OF_PRETRAIN...

JSON: ``seconds`` that writing takes on each rank, ``full``: the steps at which the disk of ``rank`` is full, and
``obstacle``: [step, other step]: once that step is written, the disk refuses once to rename the other's checkpoint.
``tests/checkpoint/test_saver.py`` starts it.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megachiar.checkpoint import save
from megachiar.checkpoint.format import checkpoint_name
from megachiar.checkpoint.snapshot import Snapshot
from megachiar.console import global_rank, run
from megachiar.pretrain import main

if __name__ == "__main__":
    _, faults, *arguments = sys.argv
    fault = json.loads(faults)
    write_share = save._write_share

    def faulty(snapshot: Snapshot, incomplete: Path) -> dict:
        written = write_share(snapshot, incomplete)
        time.sleep(fault.get("seconds", 0))
        if snapshot.step in fault.get("full", []) and global_rank() == fault["rank"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        step, other = fault.get("obstacle", (None, None))
        if snapshot.step == step:
            os.replace = refuse_once(checkpoint_name(other))
        return written

    rename = os.replace

    def refuse_once(name: str) -> Callable[[Path, Path], None]:
        def replace(source: Path, target: Path) -> None:
            if source.name == name:
                os.replace = rename
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))
            rename(source, target)

        return replace

    save._write_share = faulty
    sys.argv = ["megachiar.pretrain", *arguments]
    run(main)
