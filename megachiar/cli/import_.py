"""Make a run folder of a checkpoint of the published CHIAR-Former code, or of an export for transformers.

megachiar import exports/tiny --output runs/tiny_again
megachiar import chiar_threshold_dct_attn_wikitext103_350M_best.pt --output runs/published --tau 0.8935 0.8973 \\
  --tokenizer gpt2
megachiar import baseline_wikitext103_350M_best.pt --output runs/published_baseline --tokenizer gpt2
megachiar import chiar_v3_mixed_best.pt --output runs/mixed --calibrate data/wikitext-103/valid
megachiar import chiar_threshold_dct_attn_lra_imdb_best.pt --output runs/imdb --tau 0.8935 0.8973

The run has the model's logits; from an export it has the weights bit for bit. `megachiar evaluate`, `generate` and
`calibrate` read it, and checkpoint.load_from of another run starts from it. Optimizer state is not in such files.
Nothing in a file is executed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar.console import print_warning
from megachiar.errors import UserError
from megachiar.options import CommandParser, add_json_option, add_set_option, number

if TYPE_CHECKING:
    from megachiar.interop.imported_run import ImportReport
    from megachiar.interop.published_import import FindTau

TOKENS = 10_000_000
"""Tokens that ``--calibrate`` reads at most, as ``megachiar calibrate`` does."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("import", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="published checkpoint (*.pt), or folder of an export")
    parser.add_argument("--output", type=Path, required=True, metavar="RUN", help="the run folder to make")
    parser.add_argument(
        "--tau",
        type=number(float, least=0, most=1),
        nargs="+",
        metavar="TAU",
        help="threshold of the router on H: one number, or tau_low and tau_high, whose middle it is",
    )
    parser.add_argument("--calibrate", metavar="PREFIX", help="take tau from this dataset and the file's embedding")
    parser.add_argument("--router", choices=("soft", "hard"), help="what a learned router does, if cfg does not say it")
    parser.add_argument(
        "--heads", type=number(int, least=1), help="heads of a layer, for a file without rotary tables and n_heads"
    )
    parser.add_argument(
        "--sequence-length", type=number(int, least=1), help="longest sequence in tokens (default: the file's)"
    )
    parser.add_argument(
        "--vocab-size",
        type=number(int, least=1),
        help="rows of the embedding: rows of zeros are added, so that tensor-parallel ranks can share them",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="the model's tokenizer, kept in the run folder")
    add_set_option(parser, "keys of the run's config outside of model, such as data.validation.valid=PREFIX")
    add_json_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    if options.file.is_dir():
        import_folder(options)
        return
    tau = middle(options.tau, options.calibrate)

    from megachiar.interop.published_import import import_published
    from megachiar.interop.published_model import ImportOptions

    report, written = import_published(
        options.file,
        options.output,
        ImportOptions(tau, options.router, options.heads, options.sequence_length, options.vocab_size),
        tokenizer=options.tokenizer,
        overrides=options.overrides,
        calibration=options.calibrate,
        find_tau=calibrator(options.calibrate) if options.calibrate is not None else None,
    )
    show(options, report, written)


def import_folder(options: argparse.Namespace) -> None:
    """Import an export for transformers.

    Raises:
        UserError: an option is given that only a checkpoint of the published code takes, or the folder is no export.
    """
    from megachiar.interop.huggingface_import import check_is_export, import_huggingface

    check_is_export(options.file)

    names = ("tau", "calibrate", "router", "heads", "sequence_length", "vocab_size")
    for name in names:
        if getattr(options, name) is not None:
            problem = f"is for a checkpoint of the published code, and {options.file} is a folder"
            raise UserError(f"--{name.replace('_', '-')}", problem, "leave it out: an export says it")
    report, written = import_huggingface(
        options.file, options.output, tokenizer=options.tokenizer, overrides=options.overrides
    )
    show(options, report, written)


def show(options: argparse.Namespace, report: ImportReport, written: bool) -> None:
    """Print the report, as JSON if that is asked for."""
    if options.json:
        print(json.dumps({"written": written, **report.__dict__}))
    else:
        print_report(report, written, options.output)


def middle(tau: Sequence[float] | None, calibration: str | None) -> float | None:
    """Return the threshold that ``--tau`` names; None where it is not given.

    Raises:
        UserError: it has too many numbers, falling ones, or comes with ``--calibrate``.
    """
    if tau is None:
        return None
    given = f"--tau {' '.join(f'{value:g}' for value in tau)}"
    if calibration is not None:
        raise UserError(given, "comes with --calibrate, which finds another", "give one of the two")
    if len(tau) > 2:
        raise UserError(given, f"has {len(tau)} numbers", "give one threshold, or tau_low and tau_high")
    if tau[0] > tau[-1]:
        raise UserError(given, "has a tau_low above its tau_high", "swap them")
    return (tau[0] + tau[-1]) / 2


def calibrator(prefix: str) -> FindTau:
    """Return what finds the threshold of a model from its embedding and the dataset ``prefix``."""
    from megachiar.analysis.calibration import calibrate_on_embedding
    from megachiar.data.sampling.dataset import TokenSource
    from megachiar.model import ChiarFormer

    def find_tau(model: ChiarFormer) -> float:
        found = calibrate_on_embedding(model, TokenSource(prefix, model.config.vocab_size), TOKENS)
        if found.places[0].like_noise:
            print_warning(f"H is distributed like that of white noise on {prefix}: the threshold routes at random")
        return float(found.router["tau"])

    return find_tau


def print_report(report: ImportReport, written: bool, run: Path) -> None:
    """Print what the run holds, and what a reader of the file may miss in it."""
    from megachiar.data.preprocessing.existing import SAME

    model = report.model
    router = model["router"]
    heads, length = f"{model['num_attention_heads']} heads", f"sequences of {model['max_sequence_length']:,}"
    sizes = f"{model['num_layers']} layers, d {model['hidden_size']:,}, {heads}, {length}, {model['vocab_size']:,} ids"
    print(f"{model['kind']}: {sizes}, {report.parameters:,} parameters")
    if model["kind"] == "chiar":
        threshold = f", tau {router['tau']:g}" if isinstance(router["tau"], float) else ""
        print(f"router: {router['kind']}{threshold}; gate of layer 1: {model['meta_router']['pool']}")
    if report.task["kind"] == "classification":
        print(f"classifier: {report.task['classes']} classes")
    if report.accuracy is not None:
        print(f"test accuracy as the file has it: {report.accuracy:.2f} %")
    if report.perplexity is not None:
        print(f"validation perplexity as the file has it: {report.perplexity:.2f}")
    for name in report.left_out:
        print(f"left out: {name}")
    for note in report.notes:
        print(f"note: {note}")
    print("optimizer state: none in such files; checkpoint.load_from of another run takes the weights")
    print(f"wrote {report.checkpoint}" if written else f"{run} {SAME}")
