"""Train on one rank in a working directory of its own, as on a host that mounts other files than the others.

    python elsewhere_worker.py FOLDER_OF_RANK_0,FOLDER_OF_RANK_1,... ARGUMENTS_OF_PRETRAIN...

``tests/training/test_start.py`` starts it.
"""

from __future__ import annotations

import os
import sys

from megachiar.console import global_rank, run
from megachiar.pretrain import main

if __name__ == "__main__":
    _, folders, *arguments = sys.argv
    os.chdir(folders.split(",")[global_rank()])
    sys.argv = ["megachiar.pretrain", *arguments]
    run(main)
