"""Define the command-line options that name a corpus, which are the same for every tool that reads one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, get_args

from megachiar.data.inputs.documents import OnError, ReadOptions, TxtDocuments
from megachiar.data.inputs.source import FORMATS
from megachiar.errors import UserError

if TYPE_CHECKING:
    from megachiar.data.inputs.find_inputs import Inputs

DEFAULTS = ReadOptions()


def add_input_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that ``named_inputs`` and ``read_options`` read, and ``--on-error``.

    Args:
        parser: of the command.
        required: whether the command cannot do without ``--input``.
    """
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=required,
        metavar="PATH",
        help="files, quoted globs, folders, or - (standard input)",
    )
    add("--format", choices=FORMATS, help="format of all inputs (default: by suffix, and jsonl for standard input)")
    add(
        "--text-key",
        nargs="+",
        default=[DEFAULTS.text_key],
        metavar="KEY",
        help="key or column of the text; a.b is b of the object a; several are joined by an empty line (default: "
        f"{DEFAULTS.text_key})",
    )
    add(
        "--txt-documents",
        choices=get_args(TxtDocuments),
        default=DEFAULTS.txt_documents,
        help="a document of a text file: the whole file, a line, or a paragraph between blank lines (%(default)s)",
    )
    add(
        "--max-document-mib",
        type=int,
        default=DEFAULTS.max_document_bytes >> 20,
        help="refuse larger documents, since memory must hold one (default: %(default)s)",
    )
    add(
        "--on-error",
        choices=get_args(OnError),
        default="refuse",
        help="a broken or empty document is left out and counted (skip), or ends the run (refuse); replace: as skip, "
        "but bytes that are not UTF-8 become U+FFFD (default: %(default)s)",
    )


def named_inputs(arguments: argparse.Namespace) -> Inputs:
    """Find the inputs that the command line names, see ``find_inputs``; none where it names none."""
    from megachiar.data.inputs.find_inputs import Inputs, find_inputs  # here: it imports numpy, which --help needs not

    if arguments.input is None:
        return Inputs()
    token_key = getattr(arguments, "token_key", None)
    return find_inputs(arguments.input, arguments.format, arguments.text_key if token_key is None else [token_key])


def read_options(arguments: argparse.Namespace) -> ReadOptions:
    """Return how documents are found in the inputs.

    Raises:
        UserError: ``--max-document-mib`` leaves no room for a document.
    """
    if arguments.max_document_mib < 1:
        raise UserError("--max-document-mib", f"{arguments.max_document_mib} MiB", "use at least 1")
    first, *more = arguments.text_key
    return ReadOptions(
        first,
        arguments.txt_documents,
        arguments.max_document_mib << 20,
        more_text_keys=tuple(more),
        replace_bad_bytes=arguments.on_error == "replace",
    )
