"""Check the options of labelled documents, of pairs of texts and of ready-made ids before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.storage.index_format import DTYPE_CODES
from megachiar.data.storage.manifest import problem_of_classes, read_manifest
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.errors import UserError

LARGEST_VOCABULARY = 2 ** (8 * DTYPE_CODES[4].itemsize - 1)


def check_examples(settings: PreprocessSettings) -> None:
    """Check what can be checked without the tokenizer.

    Raises:
        UserError: an option does not go with another one, or an input cannot have what it asks for.
    """
    read, labels = settings.read, "--label-key"
    ids = read.token_key is not None
    rules = (
        (ids and settings.vocab_size is None, "--token-key", "needs --vocab-size", "give the largest id plus one"),
        (
            ids and settings.tokenizer is not None,
            "--token-key",
            "does not go with --tokenizer",
            "leave one of them out",
        ),
        (not ids and settings.tokenizer is None, "--tokenizer", "is missing", "name it, or --token-key for ids"),
        (not ids and settings.vocab_size is not None, "--vocab-size", "belongs to --token-key", "leave it out"),
        (ids and settings.eod_token is not None, "--eod-token", "is a token of --tokenizer", "leave it out"),
        (
            ids and read.second_text_key is not None,
            "--second-text-key",
            "does not go with --token-key",
            "join the ids of both texts",
        ),
        (ids and settings.allow_control_tokens, "--allow-control-tokens", "is for text", "leave it out"),
        (ids and settings.prepend_bos, "--prepend-bos", "is a token of --tokenizer", "leave it out"),
        (
            settings.bos_token is not None and not settings.prepend_bos,
            "--bos-token",
            "names a token that no document gets",
            "pass --prepend-bos too",
        ),
        (settings.labelled and settings.prepend_bos, labels, "does not go with --prepend-bos", "leave that out"),
        (settings.labelled and settings.append_eod, labels, "does not go with --append-eod", "leave --append-eod out"),
        (
            not settings.labelled and settings.classes is not None,
            "--classes",
            f"belongs to {labels}",
            f"name the key with {labels}",
        ),
    )
    for broken, where, problem, remedy in rules:
        if broken:
            raise UserError(where, problem, remedy)
    _check_values(settings)
    text = next((source for source in settings.sources if source.format == "txt"), None)
    if not read.is_one_text and text is not None:
        option = f"--{next(iter(read.extra_keys), 'text-key').replace('_', '-')}"
        raise UserError(text.name, f"is text, which has no keys, but {option} names one", "give jsonl or parquet")


def _check_values(settings: PreprocessSettings) -> None:
    """Refuse values out of range."""
    if settings.vocab_size is not None and not 1 <= settings.vocab_size <= LARGEST_VOCABULARY:
        raise UserError("--vocab-size", f"{settings.vocab_size}", f"give 1 to {LARGEST_VOCABULARY:,}")
    if settings.max_text_tokens is not None and settings.max_text_tokens < 1:
        raise UserError("--max-text-tokens", f"{settings.max_text_tokens}", "keep at least 1 token")
    if settings.classes is not None and (problem := problem_of_classes(settings.classes)):
        raise UserError("--classes", problem, "name each class once, like --classes negative,positive")


def check_edge_tokens(settings: PreprocessSettings, tokenizer: Tokenizer) -> None:
    """Check that the tokenizer has the tokens that begin or end a document, or stand between two texts, if asked for.

    Raises:
        UserError: it has none.
    """
    asking = "--append-eod" if settings.append_eod else "--second-text-key"
    if (settings.append_eod or settings.read.second_text_key is not None) and tokenizer.eod_id is None:
        problem = f"has no end-of-document token, but {asking} asks for one"
        raise UserError(tokenizer.path, problem, "name it with --eod-token")
    if settings.prepend_bos and tokenizer.bos_id is None:
        problem = "has no beginning-of-document token, but --prepend-bos asks for one"
        raise UserError(tokenizer.path, problem, "name it with --bos-token")


def check_known_classes(settings: PreprocessSettings) -> None:
    """Check that processes which read different inputs know all classes.

    Raises:
        UserError: the documents have labels, and their classes are not named.
    """
    if settings.labelled and settings.classes is None:
        problem = "many processes cannot tell the classes, which are known when all inputs are read"
        raise UserError("--label-key", problem, "name them with --classes a,b,c or --classes-from PREFIX")


def classes_of(prefix: Path) -> Sequence[str]:
    """Return the classes of a labelled dataset.

    Raises:
        UserError: there is no such dataset, or it has no labels.
    """
    manifest = read_manifest(prefix)
    if manifest is None or manifest.labels is None:
        what = "there is no dataset with a manifest" if manifest is None else "this dataset has no labels"
        raise UserError(f"--classes-from {prefix}", what, "give the prefix of a labelled dataset, or use --classes")
    return manifest.labels.classes
