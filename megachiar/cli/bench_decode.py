"""Time generation on a CPU: a step of decoding against a full pass over the text for each token, and transformers.

    megachiar bench-decode --hidden-size 512 --layers 8 --batch 1 8
    megachiar bench-decode --hidden-size 1024 --layers 28 --heads 16 --vocab-size 50304 --rounds 3

The model attends in half of its routed rows, and keeps keys of these alone. It is compared with

    full pass a token     itself without a cache, with logits of all positions, as the published code generates
    cache, dense          the attention-only baseline in the same engine
    transformers, dense   a GPT-NeoX of the same shapes in transformers' generate(), where that is installed

All contenders take turns. A ratio is the median over rounds, with quartiles. At the end it prints the bytes of a cache.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megachiar.options import CommandParser, OptionError, number


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)

    from megachiar.config.checks import nearest_hidden_sizes, uneven_heads

    size, heads = options.hidden_size, options.heads
    if (problem := uneven_heads(size, heads)) is not None:
        where = f"--hidden-size {size} with --heads {heads}"
        raise OptionError(where, problem, f"give --hidden-size {nearest_hidden_sizes(size, heads)}")

    from megachiar.inference.decode_times import time_decoding

    time_decoding(options)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("bench-decode", __doc__)
    parser.add_argument("--hidden-size", type=number(int, least=2), default=512, help="d (%(default)s)")
    parser.add_argument("--layers", type=number(int, least=3), default=8, help="(%(default)s)")
    parser.add_argument("--heads", type=number(int, least=1), default=8, help="(%(default)s)")
    parser.add_argument("--vocab-size", type=number(int, least=1), default=32768, help="(%(default)s)")
    parser.add_argument(
        "--context", type=number(int, least=1), default=256, help="tokens that were read before (%(default)s)"
    )
    parser.add_argument("--tokens", type=number(int, least=2), default=32, help="steps that are timed (%(default)s)")
    parser.add_argument("--batch", type=number(int, least=1), nargs="+", default=[1, 8], help="texts (1 8)")
    parser.add_argument(
        "--attention-share", type=number(float, least=0, most=1), default=0.5, help="of routed rows (%(default)s)"
    )
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="(%(default)s)")
    parser.add_argument(
        "--threads", type=number(int, least=1), default=len(os.sched_getaffinity(0)), help="CPU threads (%(default)s)"
    )
    parser.add_argument("--rounds", type=number(int, least=1), default=5, help="times each is measured (%(default)s)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count seconds of the processor, not of the clock: on a machine that has other work",
    )
    parser.add_argument("--without-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    return parser.parse_args(argv)
