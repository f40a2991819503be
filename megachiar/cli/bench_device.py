"""Check and time the GPU at hand: its tests, layers and training steps, in one command of fixed length.

    megachiar bench-device --minutes 8 --folder results
    megachiar bench-device --rehearse --folder results

The parts run in the order of their importance: the tests that need a GPU, then steps and layers, dense and routed,
eager and compiled. Each has a share of the time. A part that takes longer is ended, one that fails is recorded with the
end of its messages, and one that no time is left for is named. The folder then has ``device_check.json`` with all
numbers and ``device_check.md`` with one table. Both are written after each part.

The exit code is 1 where a part failed or was ended. ``--rehearse`` runs the same parts with tiny sizes on a CPU.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megachiar.errors import UserError
from megachiar.options import CommandParser, number


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if not options.rehearse:
        check_gpu()

    from megachiar.analysis.device_check import check_device
    from megachiar.analysis.device_parts import parts_of_check

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that it ends its part as Ctrl-C does
    root = Path(__file__).resolve().parents[2]
    is_good = check_device(
        parts_of_check(root, rehearse=options.rehearse),
        seconds=options.minutes * 60,
        folder=options.folder.absolute(),
        root=root,
        rehearse=options.rehearse,
    )
    return 0 if is_good else 1


def check_gpu() -> None:
    """Check that there is a GPU.

    Raises:
        UserError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("bench-device", "needs a GPU, and torch finds none", "try it with --rehearse on a CPU")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("bench-device", __doc__)
    parser.add_argument("--minutes", type=number(float, above=0), default=8.0, help="for all parts (%(default)g)")
    parser.add_argument("--folder", type=Path, default=Path("device_check"), help="of the results (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    return parser.parse_args(argv)
