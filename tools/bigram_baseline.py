"""Perplexity of an interpolated bigram model, to hold a run's beside it.

    python tools/bigram_baseline.py --train data/shakespeare/train --valid data/shakespeare/valid \\
        --test data/shakespeare/test
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megachiar.console import run
from megachiar.data.dataset import TokenSource
from megachiar.training.bigram import best_discount, fit_bigram


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, metavar="PREFIX", help="dataset the pairs are counted in")
    parser.add_argument("--valid", type=Path, required=True, metavar="PREFIX", help="dataset the discount is chosen on")
    parser.add_argument("--test", type=Path, required=True, metavar="PREFIX", help="dataset that is scored")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    train, valid, test = (TokenSource(p).dataset.tokens for p in (options.train, options.valid, options.test))
    model = fit_bigram(train, 1 + max(int(part.max()) for part in (train, valid, test)))
    discount = best_discount(model, valid)
    result = {
        "token_ppl": model.perplexity(test, discount),
        "valid_token_ppl": model.perplexity(valid, discount),
        "discount": discount,
        "tokens": len(test) - 1,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"interpolated bigram: test token PPL {result['token_ppl']:.2f} (discount {discount} chosen on valid)")


if __name__ == "__main__":
    run(main)
