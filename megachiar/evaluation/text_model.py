"""A language model with its tokenizer, as tasks ask it: text to ids, and where a text begins and ends.

Ids are those that an export of the run gives through transformers, so that tasks measure the same numbers there: where
the documents of the run's data begin with a token, each text does, unless it spells that token out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megachiar.config import RunConfig
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.errors import UserError
from megachiar.inference.engine import why_uncached
from megachiar.model.transformer import ChiarFormer


class TextModel:
    """A model that reads text.

    Attributes:
        model: in evaluation mode whenever it is asked.
        tokenizer: of the run.
        end: id that ends a text; None if nothing names one.
        known: ids that the tokenizer has, bool (V,).
        longest: tokens that the model reads at most.

    Args:
        where: names the run in errors.
        config: of the run.
        model: as the attribute.
        tokenizer: as the attribute.

    Raises:
        UserError: what the model says of a token depends on later ones, or it learns classes.
    """

    def __init__(self, where: Path | str, config: RunConfig, model: ChiarFormer, tokenizer: Tokenizer):
        check_evaluable(where, config)
        self.model, self.tokenizer, self._where = model, tokenizer, where
        self.end = tokenizer.eod_id if config.document_end is None else config.document_end
        self.longest = config.model.max_sequence_length
        self.known = torch.zeros(config.model.vocab_size, dtype=torch.bool)
        self.known[list(tokenizer.known_ids())] = True
        self._uncached = why_uncached(model)

    @property
    def prefix(self) -> int:
        """The id that a text without a beginning follows: the one that begins documents, or else ends them.

        Raises:
            UserError: nothing names such a token.
        """
        found = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.end
        if found is None:
            problem = "its tokenizer names no token that begins or ends a text, which texts without a context follow"
            raise UserError(self._where, problem, "preprocess the data with --eod-token, or leave out such tasks")
        return found

    @property
    def end_text(self) -> str | None:
        """How the token that ends a text is written; None if there is none."""
        return None if self.end is None else self.tokenizer.controls.get(self.end)

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Return the ids of ``text``; with ``begins`` behind the token that begins documents, where they have one."""
        ids = [int(token) for token in self.tokenizer.encode(text)]
        bos = self.tokenizer.bos_id
        if not begins or bos is None or self._spells_out(text, bos):
            return ids
        return [bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without control tokens."""
        return self.tokenizer.decode(ids)

    def _spells_out(self, text: str, token: int) -> bool:
        written = self.tokenizer.controls.get(token)
        return bool(written) and text.startswith(str(written))


def check_evaluable(where: Path | str, config: RunConfig) -> None:
    """Check that tasks can be asked of a run's model.

    Raises:
        UserError: it learns classes, or what it says of a token depends on later ones.
    """
    if config.tasks[0].head is not None:
        problem = "learns classes, and tasks ask for the probability of text"
        raise UserError(where, problem, "name a language model; `megachiar evaluate RUN` measures its accuracy")
    if config.model.kind == "chiar" and config.model.meta_router.pool == "batch":
        raise UserError(
            where,
            "model.meta_router.pool is batch: the gate of layer 1 averages over all tokens of a batch, later ones "
            "and those of other texts included, so that the probability of a text depends on what it is asked with",
            "evaluate a run with meta_router.pool causal or none; without --tasks the loss of any run is measured",
        )


def no_chat_template() -> UserError:
    """Return the error for tasks that are to be put into the form of a chat."""
    problem = "a pretrained model has no chat template"
    return UserError("--apply-chat-template", problem, "leave it out: tasks are asked as plain text")
