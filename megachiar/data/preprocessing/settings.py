"""Define the settings of a run of preprocessing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from megachiar.data.inputs.documents import OnError, ReadOptions
from megachiar.data.inputs.folder_files import FoundFiles
from megachiar.data.inputs.source import Source
from megachiar.data.preprocessing.split import Split
from megachiar.data.tokenizers.choices import Engine, TokenizerKind
from megachiar.data.tokenizers.ready_made import ReadyMadeIds
from megachiar.data.tokenizers.tokenizer import ReferenceTokenizer, load_tokenizer


@dataclass(frozen=True)
class PreprocessSettings:
    """Hold the settings of a run of preprocessing.

    Attributes:
        sources: the inputs of the corpus, in order.
        tokenizer, tokenizer_kind, eod_token, prepend_bos, bos_token: the arguments of ``load_tokenizer``; of
            ready-made ids none is given.
        vocab_size: the largest ready-made id that can occur, plus one; None for text.
        classes: the names of the classes of labelled documents; None takes those of the inputs, sorted.
        allow_control_tokens: whether a control string in a text, such as ``<|endoftext|>``, stands for the token.
        max_text_tokens: how many tokens of each text or list of ids are kept; None keeps all.
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
    tokenizer: Path | None
    output_prefix: Path
    tokenizer_kind: TokenizerKind = "auto"
    eod_token: str | None = None
    prepend_bos: bool = False
    bos_token: str | None = None
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
    vocab_size: int | None = None
    classes: tuple[str, ...] | None = None
    max_text_tokens: int | None = None
    allow_control_tokens: bool = False

    @property
    def labelled(self) -> bool:
        """Return whether each document has a label."""
        return self.read.label_key is not None

    def load_tokenizer(self) -> ReferenceTokenizer:
        """Load the tokenizer, or what stands in for it where the ids are ready-made.

        Raises:
            UserError: ``load_tokenizer`` raises it.
        """
        if self.tokenizer is None:
            assert self.vocab_size is not None, "ready-made ids have a size of the vocabulary"
            return ReadyMadeIds(self.vocab_size)
        return load_tokenizer(
            self.tokenizer,
            self.tokenizer_kind,
            self.eod_token,
            prepend_bos=self.prepend_bos,
            bos_token=self.bos_token,
        )

    @property
    def prefixes(self) -> list[Path]:
        """Return the path of each dataset, one for each part of the split."""
        names = self.split.names if self.split else ()
        return [Path(f"{self.output_prefix}_{name}") for name in names] or [self.output_prefix]

    @property
    def determining_options(self) -> dict[str, str]:
        """Return the options that, beside sources and tokenizer, determine which tokens are written."""
        options = {
            "text_key": self.read.text_key,
            "txt_documents": self.read.txt_documents,
            "split": "" if self.split is None else self.split.text,
            **self.read.extra_keys,
        }
        if self.read.more_text_keys:
            options["more_text_keys"] = json.dumps(self.read.more_text_keys, ensure_ascii=False)
        if self.read.replace_bad_bytes:
            options["on_error"] = "replace"
        if self.classes is not None:
            options["classes"] = json.dumps(self.classes, ensure_ascii=False)
        if self.allow_control_tokens:
            options["allow_control_tokens"] = "true"
        if self.prepend_bos:
            options["prepend_bos"] = self.bos_token or "the tokenizer's own"
        if self.max_text_tokens is not None:
            options["max_text_tokens"] = str(self.max_text_tokens)
        return options
