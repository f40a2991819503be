"""Time operators and whole layers in turn: routed layers against attention in every row, forward and backward.

    megachiar bench-layers --hidden-size 512 --sequence-length 256 1024 4096 16384

For each length it times a routed layer at each ``--attention-share``, with keys of all tokens and of routed tokens
alone, against a layer whose rows all attend (``scaled_dot_product_attention``). Then it times the operators by
themselves; on a GPU also flash-attn's attention and liger-kernel's loss, where they are installed. Each line is one
forward and backward pass; the speed-up is the median over rounds, with quartiles.

A line also has the MiB that autograd keeps of the forward pass, and how near the pass comes to the machine's limit. The
limit is the longer of two times. One is that of a large matrix product with as many FLOPs; the other is that of a large
copy of the bytes that the pass must read and write once. On a GPU a line also has the time that the GPU was busy and
the launches, since the host takes most of the time of short passes.

FLOPs count a multiply-add as 2 and a backward pass as twice the forward. Causal attention counts the keys that a query
sees. Bytes are counted for operators alone: those of inputs, results and their gradients.
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

    from megachiar.analysis.layer_times import time_layers

    time_layers(options)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("bench-layers", __doc__)
    parser.add_argument("--hidden-size", type=number(int, least=2), default=512, help="d (%(default)s)")
    parser.add_argument("--heads", type=number(int, least=1), default=8, help="(%(default)s)")
    parser.add_argument(
        "--sequence-length", type=number(int, least=1), nargs="+", default=[256, 1024, 4096], help="T (256 1024 4096)"
    )
    parser.add_argument(
        "--tokens", type=number(int, least=1), default=4096, help="in all, at least one sequence (%(default)s)"
    )
    parser.add_argument(
        "--attention-share", type=number(float, least=0, most=1), nargs="+", default=[0.5, 0.25], help="(0.5 0.25)"
    )
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="(%(default)s)")
    parser.add_argument(
        "--threads", type=number(int, least=1), default=len(os.sched_getaffinity(0)), help="CPU threads (%(default)s)"
    )
    parser.add_argument("--rounds", type=number(int, least=1), default=9, help="times each is measured (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    return parser.parse_args(argv)
