"""Find thresholds for the router from a trained model and a text, and print those of white noise beside them.

megachiar calibrate runs/400m_baseline                     # one tau, from the embedding, as published
megachiar calibrate runs/400m_baseline --where layers      # a tau for each routed layer, half to attention
megachiar calibrate runs/tiny --where layers --attention-share 0.25 --data data/shakespeare/valid --json
megachiar calibrate runs/tiny --where layers --router hashed --seed 1   # for the control with permuted channels

Of a classification it reads labelled examples as training does: cut to the sequence length, their padding left out.
A threshold belongs to one width of the model and one checkpoint. Paste the printed lines under model.router.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar.console import make_console, print_warning
from megachiar.errors import UserError
from megachiar.options import CommandParser, add_json_option, add_run_argument, number

if TYPE_CHECKING:
    from megachiar.analysis.calibration import Calibration
    from megachiar.config import ModelConfig

SHARE_MISSED = 0.01  # of the tokens of a layer: larger differences from the share that was asked for are told


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("calibrate", __doc__)
    add_run_argument(parser)
    parser.add_argument("--data", type=Path, metavar="PREFIX", help="dataset (default: the run's first source)")
    parser.add_argument("--where", choices=("embedding", "layers"), default="embedding", help="what to measure")
    parser.add_argument(
        "--attention-share",
        type=number(float, least=0, most=1),
        help="layers: share of tokens for attention (default 0.5)",
    )
    parser.add_argument(
        "--sequences",
        type=number(int, least=1),
        default=64,
        help="layers: windows or examples that are measured (default 64)",
    )
    parser.add_argument(
        "--tokens", type=number(int, least=1), default=10_000_000, help="embedding: tokens that are read (default 10 M)"
    )
    parser.add_argument(
        "--router",
        choices=("threshold", "hashed"),
        help="router.kind that the thresholds are for (default: the run's, or threshold)",
    )
    parser.add_argument("--seed", type=number(int), help="router.seed of a hashed router (default: the run's)")
    add_json_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    check(options)

    from megachiar.analysis.calibration import calibrate_on_embedding, calibrate_on_layers, config_for
    from megachiar.checkpoint.reading import locate_checkpoint
    from megachiar.inference.loaded_run import default_device, open_for_run, open_tokens_for_run
    from megachiar.inference.loading import load_model

    checkpoint = locate_checkpoint(options.run, log=print_warning)
    config, model, state = load_model(checkpoint, default_device())
    check_layers(options.run, config.model)
    wanted = config_for(config.model, options.router, options.seed)
    if options.seed is not None and wanted.router.kind != "hashed":
        raise UserError("--seed", "has no effect on thresholds of H itself", "add --router hashed or remove it")
    data = options.data or config.data.train[0].path
    share = 0.5 if options.attention_share is None else options.attention_share
    if options.where == "embedding":
        source = open_tokens_for_run(checkpoint, config, data)
        found = calibrate_on_embedding(model, source, options.tokens, wanted)
    else:
        dataset = open_for_run(checkpoint, config, data)
        found = calibrate_on_layers(model, dataset, share, options.sequences, wanted)
    if options.json:
        print(json.dumps({"run": str(options.run), "step": state.step, "data": str(data), **found.as_dict()}))
    else:
        print_table(found, f"spectral entropy H, {options.run} at step {state.step:,}, {data}")
        print_router(found)
    warn(found)
    if options.where == "layers":
        warn_of_ties(found, share)


def check(options: argparse.Namespace) -> None:
    """Refuse options that make no sense.

    Raises:
        UserError: names the flag, its value and its limits.
    """
    share = options.attention_share
    if share is not None and options.where == "embedding":
        raise UserError("--attention-share", "has no effect with --where embedding", "add --where layers or remove it")


def check_layers(path: Path, model: ModelConfig) -> None:
    """Refuse a model without a layer that could route.

    Raises:
        UserError: names the run and its layers.
    """
    if model.num_layers < 3:
        raise UserError(path, f"has {model.num_layers} layers; only layers 2 to L-1 route", "use a deeper model")


def print_router(found: Calibration) -> None:
    """Print the thresholds as a config has them."""
    import yaml

    snippet = yaml.safe_dump(found.router, sort_keys=False, default_flow_style=None)
    print(f"\n# under model.router\n{snippet}", end="")


def print_table(found: Calibration, title: str) -> None:
    """Print the entropies at each place of the model and of white noise, and the thresholds they suggest.

    The column ``worth`` has the number of independent tokens that would tell as much as the tokens that were read.
    """
    from rich.console import Console
    from rich.table import Table

    from megachiar.analysis.calibration import PERCENTILES

    table = Table(title=title, title_justify="left")
    table.add_column("at")
    for name in ("tokens", "worth", "mean", "sd", *(f"{p}%" for p in PERCENTILES), "from noise", "thresholds"):
        table.add_column(name, justify="right")
    rows = [
        (p.name, f"{p.tokens:,}", f"{p.effective_tokens:,.0f}", p.measured, f"{p.noise_distance:.2f}", p.bounds)
        for p in found.places
    ]
    for name, tokens, worth, h, distance, bounds in [*rows, ("white noise", "", "", found.noise, "", ())]:
        numbers = [h.mean, h.deviation, *h.percentiles.values()]
        thresholds = " ".join(f"{bound:.4f}" for bound in bounds)
        table.add_row(name, tokens, worth, *(f"{number:.4f}" for number in numbers), distance, thresholds)
    Console(width=140, highlight=False).print(table)


def warn(found: Calibration) -> None:
    """Warn on standard error of each threshold that routes no better than chance, unless it is meant to."""
    if found.router["kind"] == "hashed":
        return
    names = [place.name for place in found.places if place.like_noise]
    if names:
        make_console().print(
            f"[bold yellow]warning:[/] H is distributed like that of white noise at {', '.join(names)}. A threshold "
            "there routes at random. Compare with router.kind hashed and random at the same share."
        )


def warn_of_ties(found: Calibration, share: float) -> None:
    """Warn on standard error where no threshold gives the attention share, since many tokens have the same H."""
    given = {place.name: place.attention_share for place in found.places if place.attention_share is not None}
    missed = {name: each for name, each in given.items() if abs(each - share) > SHARE_MISSED}
    if missed:
        shares = ", ".join(f"{name} {each:.1%}" for name, each in missed.items())
        make_console().print(
            f"[bold yellow]warning:[/] the thresholds nearest to an attention share of {share:.1%} give other shares: "
            f"{shares}. Many tokens have the same H there, as with a small vocabulary, and no threshold divides them."
        )
