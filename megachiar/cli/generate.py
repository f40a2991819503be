"""Sample text from a run, and show it as it comes.

megachiar generate runs/tiny --prompt "To be, or"
megachiar generate runs/tiny --prompt "To be, or" --temperature 0.7 --top-p 0.9 --max-new-tokens 300 --seed 1
echo "To be, or" | megachiar generate runs/tiny --prompt -
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from megachiar.console import print_warning
from megachiar.options import CommandParser, add_run_argument, add_sampling_options, number

LARGEST_SEED = 2**62
"""The random numbers of torch take seeds below 2^64; later samples have larger ones than the first."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("generate", __doc__)
    add_run_argument(parser)
    parser.add_argument("--prompt", default="", help="text to continue; - reads it from standard input")
    add_sampling_options(parser, "at most so many tokens")
    parser.add_argument(
        "--num-samples", type=number(int, least=1), default=1, help="samples of the same prompt (default 1)"
    )
    parser.add_argument(
        "--seed",
        type=number(int, least=0, most=LARGEST_SEED),
        default=0,
        help="of the first sample; the next has seed + 1 (default 0)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a sample")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.checkpoint.reading import locate_checkpoint
    from megachiar.inference.engine import why_uncached
    from megachiar.inference.loaded_run import TextSampler, default_device
    from megachiar.inference.loading import load_model

    checkpoint = locate_checkpoint(options.run, log=print_warning)
    config, model, _ = load_model(checkpoint, default_device())
    sampler = TextSampler(checkpoint, config, model)
    prompt = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    if (reason := why_uncached(model)) is not None:
        print_warning(reason)
    for sample in range(options.num_samples):
        sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        sampling["seed"] = options.seed + sample
        if options.json:
            text, new = sampler(prompt, options.max_new_tokens, **sampling)
            print(json.dumps({"prompt": prompt, "seed": options.seed + sample, "text": text, "new_tokens": len(new)}))
            continue
        for piece in sampler.pieces(prompt, options.max_new_tokens, **sampling):
            print(piece, end="", flush=True)
        print("\n" if sample + 1 < options.num_samples else "")
