"""Turn text into tokens on disk: the engine behind ``megachiar preprocess``.

    sources -> groups of chunks -> [parse, tokenize, split] -> builders -> (shuffle) -> PREFIX.bin, .idx, .json
               parent              workers, in any order      parent, in the order of the input

Output bytes depend only on the input, the tokenizer and the options. They do not depend on the number of workers, nor
on how often the run was killed and started again: ``PREFIX.journal`` says which inputs are done. All outputs of a run
appear at its end or not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megachiar.data.inputs.find_inputs import same_file
from megachiar.data.preprocessing.encoder import encode_without_threads
from megachiar.data.preprocessing.example_checks import check_edge_tokens, check_examples
from megachiar.data.preprocessing.existing import OutputDiffers, find_existing
from megachiar.data.preprocessing.journal import Journal
from megachiar.data.preprocessing.report import Report
from megachiar.data.preprocessing.run import PreprocessRun
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.storage.files import check_prefix, possible_files
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.errors import UserError, disk_errors


def preprocess(settings: PreprocessSettings, stream: TextIO | None = None) -> Report:
    """Tokenize a corpus into datasets, and continue where an earlier run of the same call was stopped.

    Nothing is done where an earlier run of the same call was finished and no input has another text since.

    Args:
        settings: what to do.
        stream: where progress is shown; standard error if None.

    Raises:
        UserError: an output exists and is not what this call makes, the input or tokenizer cannot be used, a worker
            died, or the disk is full. No new dataset is left then; the inputs that were done are kept for the next
            run.
    """
    with disk_errors(settings.output_prefix, "read or write"):
        return _preprocess(settings, stream or sys.stderr)


def _preprocess(settings: PreprocessSettings, stream: TextIO) -> Report:
    """Check settings and outputs, and carry out the run."""
    encode_without_threads()
    check_prefix(settings.output_prefix)
    for line in itertools.chain.from_iterable(found.lines() for found in settings.found):
        print(line, file=stream)
    check_examples(settings)
    tokenizer = settings.load_tokenizer()
    check_edge_tokens(settings, tokenizer)
    if not journal_path(settings).exists():
        if (existing := existing_report(settings, tokenizer, stream)) is not None:
            return existing
        check_outputs(settings, tokenizer)  # before anything is written
    with open_journal(settings, tokenizer, stream) as journal:
        if journal.stage != "placing":
            check_outputs(settings, tokenizer)
        return PreprocessRun(settings, tokenizer, journal, stream).run()


def journal_path(settings: PreprocessSettings) -> Path:
    """Return the file of a run's journal."""
    return Path(f"{settings.output_prefix}.journal")


@contextlib.contextmanager
def open_journal(settings: PreprocessSettings, tokenizer: Tokenizer, stream: TextIO) -> Iterator[Journal]:
    """Open the run's journal; keep it if the block fails after something was done, and remove it otherwise."""
    options = {
        "tokenizer": tokenizer.fingerprint,
        "end_of_document": tokenizer.eod_id if settings.append_eod else None,
        **({} if tokenizer.bos_id is None else {"beginning_of_document": tokenizer.bos_id}),
        "shuffle_seed": settings.shuffle_seed,
        **settings.determining_options,
    }
    journal = Journal.open(journal_path(settings), options, restart=settings.restart)
    try:
        journal.check_sources(settings.sources, settings.read, stream)
        yield journal
    except BaseException:
        if journal.sources or journal.stage != "encoding":
            journal.close()
        else:
            with contextlib.suppress(UserError):  # the first error is the one to report
                journal.remove()
        raise
    journal.remove()


def existing_report(settings: PreprocessSettings, tokenizer: Tokenizer, stream: TextIO | None = None) -> Report | None:
    """Report on the datasets of this call if an earlier one made them; return None if there is something to do."""
    if settings.overwrite:
        return None
    try:
        return Report.of_existing(find_existing(settings, tokenizer, stream))
    except OutputDiffers:
        return None


def check_outputs(settings: PreprocessSettings, tokenizer: Tokenizer) -> None:
    """Refuse an output that is also an input or the tokenizer, and one that exists and may not be replaced.

    Raises:
        UserError: the message names the file, and says why it is not what this call would make.
    """
    # One of the tokenizer's files may be named like an output: tok.json would be the manifest of the prefix tok.
    tokenizer_files = [] if settings.tokenizer is None else [settings.tokenizer, *settings.tokenizer.glob("*")]
    for path in itertools.chain.from_iterable(map(possible_files, settings.prefixes)):
        if path.resolve() in {file.resolve() for file in tokenizer_files} or same_file(path, settings.sources):
            raise UserError(path, "is an input and would be an output too", "choose another --output-prefix")
        if path.exists() and not settings.overwrite:
            problem = describe_existing(settings, tokenizer)
            raise UserError(path, problem, "choose another --output-prefix, or pass --overwrite")


def describe_existing(settings: PreprocessSettings, tokenizer: Tokenizer) -> str:
    """Say that an output exists, and why it is not what this call would make."""
    try:
        find_existing(settings, tokenizer)
    except OutputDiffers as difference:
        return f"exists already, and not as this command makes it: {difference}"
    return "exists already"
