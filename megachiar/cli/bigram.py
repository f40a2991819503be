"""Measure the perplexity of an interpolated bigram model on the same tokens as `megachiar evaluate`.

    megachiar bigram --train data/shakespeare/train --valid data/shakespeare/valid \\
        --test data/shakespeare/test

Pairs are counted in --train, the discounts are fitted on --valid, and every token of --test after the first is scored.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megachiar.options import CommandParser, add_json_option, number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("bigram", __doc__)
    add = parser.add_argument
    add("--train", type=Path, required=True, metavar="PREFIX", help="dataset the pairs are counted in")
    add("--valid", type=Path, required=True, metavar="PREFIX", help="dataset the discounts are fitted on")
    add("--test", type=Path, required=True, metavar="PREFIX", help="dataset that is scored")
    add(
        "--vocab-size",
        type=number(int, least=1),
        metavar="V",
        help="default: of the datasets' tokenizer, else the largest id + 1",
    )
    add_json_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.analysis.bigram import bigram_baseline

    result = bigram_baseline(options.train, options.valid, options.test, options.vocab_size)
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        discounts = ", ".join(f"{discount:.3f}" for discount in result.discounts)
        print(
            f"interpolated bigram: test token PPL {result.token_ppl:.2f} over {result.tokens:,} tokens "
            f"(valid {result.valid_token_ppl:.2f}; discounts {discounts}; vocabulary {result.vocab_size:,})"
        )
