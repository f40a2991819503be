"""Continue texts that you type, with a run that was trained on plain text: it goes on, it does not answer.

megachiar chat runs/tiny
megachiar chat runs/tiny --temperature 0.7 --top-p 0.9 --max-new-tokens 300

A line that you type is put behind the text so far, and the run goes on from there. An empty line lets it go on, /new
begins a new text, and /quit or Ctrl-D ends. Ctrl-C stops what the run writes; where nothing is written, it ends too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megachiar.console import make_console, print_warning
from megachiar.options import (
    CommandParser,
    add_dtype_option,
    add_run_argument,
    add_sampling_options,
    add_step_option,
    number,
)

if TYPE_CHECKING:
    from megachiar.inference.loaded_run import TextSampler  # imports torch, which --help does not need


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("chat", __doc__)
    add_run_argument(parser)
    add_step_option(parser)
    add_dtype_option(parser)
    add_sampling_options(parser, "at most so many tokens a line")
    parser.add_argument(
        "--seed", type=number(int, least=0, most=2**62), default=0, help="of the first line; the next has seed + 1"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.checkpoint.reading import locate_step
    from megachiar.inference.engine import why_uncached
    from megachiar.inference.loaded_run import TextSampler, default_device
    from megachiar.inference.loading import load_model
    from megachiar.model.dtypes import DTYPES

    checkpoint = locate_step(options.run, options.step, log=print_warning)
    config, model, _ = load_model(checkpoint, default_device(), DTYPES.get(options.dtype))
    sampler = TextSampler(checkpoint, config, model)
    if (reason := why_uncached(model)) is not None:
        print_warning(reason)
    if sys.stdin.isatty():
        hint = "type a text, and the run goes on; /new begins another one, Ctrl-C stops the run, Ctrl-D ends"
        make_console().print(hint, markup=False)
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    text = ""
    for turn, line in enumerate(typed_lines()):
        if line == "/new":
            text = ""
            continue
        text += ("\n" if text and line else "") + line
        text = go_on(sampler, text, options.max_new_tokens, sampling | {"seed": options.seed + turn})


def typed_lines() -> Iterator[str]:
    """Yield the lines of standard input up to /quit, with a prompt on a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if line == "/quit":
            return
        yield line


def go_on(sampler: TextSampler, text: str, max_new_tokens: int, sampling: dict[str, Any]) -> str:
    """Print the continuation of ``text`` as it comes, and return both; Ctrl-C stops it.

    Raises:
        UserError: the text is empty and nothing names the token that ends a document.
    """
    pieces = sampler.pieces(text, max_new_tokens, **sampling)
    text = next(pieces)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        make_console().print("   (stopped)", markup=False)
    print(flush=True)
    return text
