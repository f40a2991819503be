"""One row of the table of other stacks' words, and the names of the stacks."""

from __future__ import annotations

from typing import NamedTuple


class ForeignKey(NamedTuple):
    """One thing that other stacks configure.

    Attributes:
        words: what they call it, separated by spaces, with underscores for dashes. A dotted word is the end of a path:
            ``eval.interval`` is the key ``interval`` below ``eval``.
        stacks: whose words these are.
        ours: our keys, separated by spaces; empty where there is nothing to set.
        how: how the value translates, or why there is nothing to set; empty where the value stays as it is.
    """

    words: str
    stacks: str
    ours: str
    how: str = ""


MEGATRON, NEOX, DEEPSPEED, TITAN, HF = "Megatron-LM", "GPT-NeoX", "DeepSpeed", "torchtitan", "HF"
LITGPT, OLMO = "litgpt", "OLMo"
