"""Define the settings of a run of preprocessing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megachiar.data.inputs.documents import OnError, ReadOptions
from megachiar.data.inputs.folder_files import FoundFiles
from megachiar.data.inputs.source import Source
from megachiar.data.preprocessing.split import Split
from megachiar.data.tokenizers.choices import Engine, TokenizerKind


@dataclass(frozen=True)
class PreprocessSettings:
    """Hold the settings of a run of preprocessing.

    Attributes:
        sources: the inputs of the corpus, in order.
        tokenizer, tokenizer_kind, eod_token: the arguments of ``load_tokenizer``.
        engine: the encoder, see ``choose_engine``.
        output_prefix: the dataset's path without suffix; with ``split``, the parts are ``PREFIX_name``.
        read: how documents are found.
        append_eod: end each document with the tokenizer's end-of-document id.
        split: the parts, assigned by document hash; None for one dataset.
        on_error: whether an invalid document ends the run, see ``InvalidDocumentLog``.
        workers: the number of tokenizing processes; 1 tokenizes in this process.
        fork: whether workers are copies of this process, see ``ordered_map``.
        shuffle_seed: the seed that shuffles the documents of each part; None keeps the order of the input.
        overwrite: replace datasets that exist, at the end of the run.
        restart: drop the files of an unfinished run, instead of continuing it.
        allow_empty: write no dataset where a part got no document, instead of refusing that.
        found: what folders and globs among the inputs gave, for the report.
    """

    sources: list[Source]
    tokenizer: Path
    output_prefix: Path
    tokenizer_kind: TokenizerKind = "auto"
    eod_token: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    append_eod: bool = False
    split: Split | None = None
    on_error: OnError = "refuse"
    workers: int = 1
    fork: bool = False
    engine: Engine = "auto"
    shuffle_seed: int | None = None
    overwrite: bool = False
    restart: bool = False
    allow_empty: bool = False
    found: list[FoundFiles] = field(default_factory=list)

    @property
    def prefixes(self) -> list[Path]:
        """Return the path of each dataset, one for each part of the split."""
        names = self.split.names if self.split else ()
        return [Path(f"{self.output_prefix}_{name}") for name in names] or [self.output_prefix]

    @property
    def determining_options(self) -> dict[str, str]:
        """Return the options that, beside sources and tokenizer, determine which tokens are written."""
        return {
            "text_key": self.read.text_key,
            "txt_documents": self.read.txt_documents,
            "split": "" if self.split is None else self.split.text,
        }
