"""What other stacks call our keys: the words of their configs and command lines, each with our key for it.

The table answers an unknown key of a config with the key that means the same here, and says how the value translates
where it does not stay as it is. The words are those of the stacks' own documentation:

    Megatron-LM   megatron/training/arguments.py        torchtitan  torchtitan/config/job_config.py
    GPT-NeoX      configs/neox_arguments.md             litgpt      config_hub/pretrain/*.yaml
    DeepSpeed     docs: DeepSpeed Configuration JSON    HF          TrainingArguments, a model's config.json
"""

from __future__ import annotations

from collections.abc import Sequence

from megachiar.config.foreign.data import DATA
from megachiar.config.foreign.layout import PARALLEL, PRECISION
from megachiar.config.foreign.model import MODEL
from megachiar.config.foreign.records import CHECKPOINT, LOGGING
from megachiar.config.foreign.row import ForeignKey
from megachiar.config.foreign.training import OPTIMIZER, SCHEDULE, TRAINING

TABLE = (*MODEL, *DATA, *PARALLEL, *PRECISION, *OPTIMIZER, *SCHEDULE, *TRAINING, *CHECKPOINT, *LOGGING)
WORDS = {word: foreign for foreign in TABLE for word in foreign.words.split()}


def foreign_key(path: Sequence[str]) -> ForeignKey | None:
    """Return the row for the key at ``path``, at whatever level it stands; None where no stack calls anything so."""
    names = [normalized(name) for name in path]
    return next((WORDS[word] for first in range(len(names)) if (word := ".".join(names[first:])) in WORDS), None)


def normalized(name: str) -> str:
    """Return ``name`` as the table writes it: ``--seq-length`` is ``seq_length``."""
    return name.lstrip("-").replace("-", "_").lower()
