"""Read a run of a language model token by token: the loss of each token, and whether it was the likeliest one.

Shapes: n sequences, T tokens of a sequence, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megachiar.checkpoint.reading import locate_checkpoint
from megachiar.config import RunConfig
from megachiar.data.sampling.dataset import ValidationSet
from megachiar.errors import UserError
from megachiar.inference.loaded_run import default_device, open_text_for_run
from megachiar.inference.loading import load_model
from megachiar.kernels.ignored_target import IGNORED_TARGET
from megachiar.model import ChiarFormer
from megachiar.model.dtypes import DTYPES


class LanguageModel:
    """Hold the model of a run.

    Attributes:
        checkpoint: that was loaded.
        config: of the run.
        step: of the checkpoint.

    Args:
        checkpoint, config, step: as the attributes.
        model: in evaluation mode.

    Raises:
        UserError: the run learns classes.
    """

    def __init__(self, checkpoint: Path, config: RunConfig, step: int, model: ChiarFormer):
        if config.tasks[0].head is not None:
            raise UserError(checkpoint, "learns classes, and has no loss of a next token", "name a language model")
        self.checkpoint, self.config, self.step, self._model = checkpoint, config, step, model
        self._device = next(model.parameters()).device

    @classmethod
    def load(cls, run: Path, dtype: str | None, log: Callable[[str], None]) -> LanguageModel:
        """Load a run folder's newest whole checkpoint, or one checkpoint.

        Args:
            run: its path.
            dtype: name of the weights' type; that of the run if None.
            log: is told of a damaged checkpoint that was passed over.

        Raises:
            UserError: there is no whole checkpoint at ``run``, or the run learns classes.
        """
        checkpoint = locate_checkpoint(run, log=log)
        config, model, state = load_model(checkpoint, default_device(), DTYPES.get(dtype) if dtype else None)
        return cls(checkpoint, config, state.step, model)

    def open_text(self, prefix: Path, sequence_length: int | None = None) -> ValidationSet:
        """Open a dataset that the model can read, see ``open_text_for_run``."""
        return open_text_for_run(self.checkpoint, self.config, prefix, sequence_length)

    @torch.inference_mode()
    def predict(self, inputs: np.ndarray, targets: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict tokens, see ``megachiar.analysis.long_range.Predict``."""
        tokens, wanted, ids = (torch.from_numpy(array).to(self._device) for array in (inputs, targets, numbers))
        logits = self._model(tokens, None, ids).logits  # (n, T, V)
        is_target = wanted != IGNORED_TARGET
        of_targets = logits[is_target].double()
        nats = torch.zeros(wanted.shape, dtype=torch.float64, device=self._device)
        right = torch.zeros(wanted.shape, dtype=torch.bool, device=self._device)
        nats[is_target] = F.cross_entropy(of_targets, wanted[is_target], reduction="none")
        right[is_target] = of_targets.argmax(-1) == wanted[is_target]
        return nats.cpu().numpy(), right.cpu().numpy()

    @torch.inference_mode()
    def token_losses(self, inputs: np.ndarray, targets: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the losses of tokens, see ``megachiar.analysis.long_range.TokenLosses``."""
        tokens, wanted, ids = (torch.from_numpy(array).to(self._device) for array in (inputs, targets, numbers))
        return self._model(tokens, wanted, ids).token_losses.double().cpu().numpy()
