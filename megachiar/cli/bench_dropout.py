"""Time keyed dropout and torch's own, forward and backward, in turn in one process.

    megachiar bench-dropout --threads 2

It prints times and their ratio, medians with quartiles: below 1 keyed dropout is faster. Attention is compared with
``scaled_dot_product_attention(dropout_p=...)``.
"""

from __future__ import annotations

from collections.abc import Sequence

from megachiar.options import CommandParser, number


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser("bench-dropout", __doc__)
    parser.add_argument("--threads", type=number(int, least=1), help="CPU threads (default: torch's own)")
    parser.add_argument("--rounds", type=number(int, least=1), default=15, help="times each is measured (%(default)s)")
    options = parser.parse_args(argv)

    from megachiar.analysis.dropout_times import time_dropout

    time_dropout(options.threads, options.rounds)
    return 0
