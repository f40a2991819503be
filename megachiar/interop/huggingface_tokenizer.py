"""Write a run's tokenizer such that ``AutoTokenizer`` loads it and gives the ids that the run was trained on.

    tokenizer.json            of a Hugging Face or GPT-2 tokenizer, without what would add or drop tokens
    tokenizer.model           of a SentencePiece one, with tokenization_chiar.py, which reads it
    tokenizer_config.json     its settings
    megachiar/                the run's own copy of the tokenizer and its record, for an import

The ids of texts that are known to be hard are compared. A tokenizer that holds control tokens as ordinary entries may
encode a literal ``</s>`` in another way than in training: then a note says so. Where the documents of the run's data
begin with a token, so does each text here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megachiar.config import RunConfig
from megachiar.data.tokenizers.fast import HARD_TEXTS
from megachiar.data.tokenizers.recorded import keep_tokenizer
from megachiar.data.tokenizers.sentencepiece_model import SentencePieceTokenizer
from megachiar.data.tokenizers.tokenizer import ReferenceTokenizer, load_tokenizer
from megachiar.errors import UserError
from megachiar.training.run_tokenizer import run_tokenizer

KEPT = "megachiar"
"""The folder of an export that has the run's own tokenizer."""
SENTENCEPIECE_FILE, SENTENCEPIECE_CODE = "tokenizer.model", "tokenization_chiar.py"


def tokenizer_of(checkpoint: Path, config: RunConfig) -> ReferenceTokenizer | None:
    """Return the tokenizer of the run that wrote ``checkpoint``; None where none is left."""
    try:
        found = run_tokenizer(checkpoint, config)
    except UserError:
        return None
    bos = found.bos_id
    return load_tokenizer(found.path, found.kind, found.eod_id, prepend_bos=bos is not None, bos_token=bos)


def end_of(config: RunConfig, tokenizer: ReferenceTokenizer | None) -> int | None:
    """Return the id that ends a text, as ``megachiar generate`` knows it; None if nothing names one."""
    if config.document_end is not None:
        return config.document_end
    return tokenizer.eod_id if tokenizer is not None else None


def export_tokenizer(
    tokenizer: ReferenceTokenizer, folder: Path, *, end: int | None, longest: int, is_classifier: bool
) -> None:
    """Write the files of ``tokenizer`` to ``folder``.

    Args:
        tokenizer: of the run.
        folder: of the export.
        end: the id that ends a text, which fills up batches too; None if there is none.
        longest: tokens of the longest text that the model reads.
        is_classifier: whether batches are filled up on the right, and not on the left.

    Raises:
        UserError: the disk is full or read-only.
        OSError: likewise.
    """
    token = _token(tokenizer, end)
    settings: dict[str, Any] = {
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "right" if is_classifier else "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": token if token is not None else _token(tokenizer, 0),
    }
    if token is not None:
        settings["eos_token"] = token
    bos = _token(tokenizer, tokenizer.bos_id)
    if bos is not None:
        settings["bos_token"] = bos
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / SENTENCEPIECE_FILE).write_bytes(tokenizer.definition())
        shutil.copyfile(Path(__file__).with_name(SENTENCEPIECE_CODE), folder / SENTENCEPIECE_CODE)
        settings |= {
            "tokenizer_class": "ChiarTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_chiar.ChiarTokenizer", None]},
            "guarded": sorted(tokenizer.guarded),
            "prepend_bos": bos is not None,
        }
    else:
        definition = json.loads(tokenizer.definition())
        if bos is not None:
            definition["post_processor"] = _prepending(bos, tokenizer.bos_id)
        elif (definition.get("post_processor") or {}).get("type") != "ByteLevel":  # which moves offsets alone
            definition["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    keep_tokenizer(tokenizer, folder / KEPT)


def _prepending(token: str, index: int | None) -> dict[str, Any]:
    """Return the post-processor of a tokenizer.json that puts a token before each text."""
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _token(tokenizer: ReferenceTokenizer, index: int | None) -> str | None:
    """Return the string of an id; None for None."""
    if index is None:
        return None
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.piece(index)
    import tokenizers

    return tokenizers.Tokenizer.from_str(str(tokenizer.definition())).id_to_token(index)


def check_tokenizer(transformers: Any, tokenizer: ReferenceTokenizer, folder: Path, end: int | None) -> list[str]:
    """Compare the tokenizer that ``AutoTokenizer`` loads from ``folder`` with the run's.

    Returns:
        Notes on texts that get other ids, and hold control tokens.

    Raises:
        UserError: another text gets other ids, or the end-of-text token has another id.
    """
    loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    remedy = "export without the tokenizer's files with --no-tokenizer, and encode text with the run's own"
    if end is not None and loaded.eos_token_id != end:
        problem = f"AutoTokenizer ends a text with id {loaded.eos_token_id}, and the run with {end}"
        raise UserError(tokenizer.path, problem, remedy)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    controls = [text for text in tokenizer.controls.values() if text]
    notes = []
    for text in (*HARD_TEXTS, *(f"a {control} b{control}" for control in controls)):
        try:
            expected = [*start, *(int(index) for index in tokenizer.encode(text))]
        except UserError:  # the run's own refuses to encode it
            continue
        found = loaded(text)["input_ids"]
        if found == expected:
            continue
        if any(control in text for control in controls):
            named = next(control for control in controls if control in text)
            notes.append(f"AutoTokenizer gives other ids than the run's tokenizer to a text that holds {named!r}")
            continue
        problem = f"AutoTokenizer gives other ids to {text[:40]!r}: {found[:8]}, not {expected[:8]}"
        raise UserError(tokenizer.path, problem, remedy)
    return sorted(set(notes))
