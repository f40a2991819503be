"""Recognise, in a folder of text, the files that our own commands write beside it: they are never part of a corpus.

    PREFIX.bin PREFIX.idx PREFIX.json    a tokenized dataset (`megachiar preprocess`, `megachiar merge`)
    PREFIX.journal PREFIX.*.tmp          a dataset whose preprocessing was stopped or is under way
    PREFIX.inputs                        a note that says what the inputs of a dataset were when they were read
    NAME.made                            a note that says how a corpus, or the tokenizer NAME beside it, was made
    config.yaml metrics.jsonl ...        the files of a run folder (`megachiar pretrain`), or of a checkpoint in it

A file is recognised by what it holds or by what stands beside it, never by its suffix alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megachiar.data.inputs.folder_walk import LeftOut
from megachiar.data.storage.index_format import MAGIC

HEAD_BYTES = 64  # read of a file whose name may be one of ours
DATASET = "part of a tokenized dataset"
UNFINISHED = "part of an unfinished dataset"
CORPUS_NOTE = "a note that says how the corpus was made"
TOKENIZER_NOTE = "a note that says how a tokenizer was made"
TOKENIZER = "a tokenizer, as the note beside it says"
OWN_HEADS = {  # suffix -> (how such a file of ours begins, what it is), for each thing that it may be
    ".idx": [(re.compile(re.escape(MAGIC)), DATASET)],
    ".json": [(re.compile(rb'\{\s*"format_version": \d'), DATASET)],
    ".journal": [(re.compile(rb'\{"journal": \d'), UNFINISHED)],
    ".inputs": [(re.compile(rb'\{"inputs": \d'), DATASET)],
    ".made": [
        (re.compile(rb'\{\s*"asked": \{\s*"vocab_size"'), TOKENIZER_NOTE),
        (re.compile(rb'\{\s*"asked": \{\s*"source"'), CORPUS_NOTE),
    ],
}
PART_OF_RUN = "part of a run folder"
RUN_CONFIG = re.compile(rb"model:\n(?:[ ].*\n)+(?s:.*)^training:\n(?s:.*)^logging:\n", re.MULTILINE)
"""How the config begins that a run writes into its folder and its checkpoints: whole sections in their order."""
RUN_CONFIG_BYTES = 1 << 16  # read of such a config
RUN_EVIDENCE = {
    "metrics.jsonl": re.compile(rb'\{"step": \d+, "kind": "'),
    "state.json": re.compile(rb'\{\s*"format_version": \d+,\s*"created_by": "megachiar '),
}
"""File beside that config -> how it begins in a run folder, or in a checkpoint. One of them must be there."""
_OF_CHECKPOINT = r"config\.yaml|state\.json|(weights|optimizer)-[\w-]+\.safetensors"
RUN_FILES = re.compile(
    rf"{_OF_CHECKPOINT}|metrics\.jsonl|tokenizer_record\.json"
    rf"|checkpoints/step_\d{{8,}}(\.incomplete)?/({_OF_CHECKPOINT})"
    r"|tokenizer/([^/]+/)?([^/]+\.(model|json)|merges\.txt)"
    r"|tensorboard/events\.out\.tfevents\.[^/]+"
    r"|trackers\.json|mlflow\.db|wandb/.+|profile/steps_\d+-\d+_rank_\d+(\.json\.gz|_memory\.pickle)"
)
"""The files of a run folder, or of a checkpoint that was copied out of it, by their whole paths in it."""
TEMPORARY = re.compile(r"(.+)\.(bin|idx|json|starts|labels|labels\.npy)\.tmp$")


def find_own_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Find the files of ``folder`` that our own commands wrote.

    Args:
        folder: where the files are.
        names: all files of the folder, by their paths in it.

    Returns:
        path in the folder -> what the file is.

    Raises:
        OSError: a file cannot be read.
    """
    known = set(names)
    by_content = dict(_recognised(folder, known))
    return by_content | {name: what for name in known if (what := _by_neighbour(name, known, by_content)) is not None}


def leave_out_runs(folder: Path, names: list[str]) -> tuple[list[str], list[LeftOut]]:
    """Take the files that a run wrote out of the files of ``folder``; text that lies beside them stays.

    Args:
        folder: where the files are.
        names: all files of the folder, by their paths in it.

    Returns:
        The other files, and the files of runs.

    Raises:
        OSError: a config, or what stands beside it, cannot be read.
    """
    configs = (name.removesuffix("config.yaml") for name in names if name.rpartition("/")[2] == "config.yaml")
    runs = [run for run in configs if _is_run_folder(folder / run)]
    own = {name for run in runs for name in names if name.startswith(run) and RUN_FILES.fullmatch(name[len(run) :])}
    return [name for name in names if name not in own], [LeftOut(name, PART_OF_RUN) for name in names if name in own]


def _is_run_folder(folder: Path) -> bool:
    """Return whether the ``config.yaml`` of a folder is one of a run, with metrics or a checkpoint beside it."""
    states = list(folder.glob("checkpoints/step_*/state.json"))
    found = [(path, RUN_EVIDENCE[path.name]) for path in (*(folder / name for name in RUN_EVIDENCE), *states)]
    evidence = any(path.is_file() and _begins(path, how, HEAD_BYTES) for path, how in found)
    return evidence and _begins(folder / "config.yaml", RUN_CONFIG, RUN_CONFIG_BYTES)


def _begins(path: Path, how: re.Pattern[bytes], size: int) -> bool:
    """Return whether the first ``size`` bytes of a file match ``how``."""
    with open(path, "rb") as file:
        return how.match(file.read(size)) is not None


def _recognised(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each name whose file begins as one of ours does, with what it is."""
    for name in names:
        kinds = OWN_HEADS.get(name[name.rfind(".") :])
        if kinds is not None:
            with open(folder / name, "rb") as file:
                head = file.read(HEAD_BYTES)
            yield from ((name, what) for begins, what in kinds if begins.match(head))


def _by_neighbour(name: str, names: set[str], own: dict[str, str]) -> str | None:
    """Say what a file is of which a recognised file beside it tells; None if none does."""
    for suffix in (".bin", ".labels.npy"):
        if name.endswith(suffix):
            return own.get(f"{name.removesuffix(suffix)}.idx")
    if temporary := TEMPORARY.match(name):
        prefix = temporary[1]
        begun = f"{prefix}.journal" in own or {f"{prefix}.bin.tmp", f"{prefix}.idx.tmp"} <= names
        return UNFINISHED if begun else None
    return TOKENIZER if own.get(f"{name}.made") == TOKENIZER_NOTE else None
