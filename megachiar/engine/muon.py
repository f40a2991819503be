"""Muon for the matrices between hidden states, beside AdamW for all other parameters (arXiv 2502.16982).

    buffer    = momentum * buffer + (1 - momentum) * gradient
    direction = momentum * buffer + (1 - momentum) * gradient with nesterov, else buffer
    weight    = (1 - lr * weight_decay) * weight - lr * scale * orthogonalised(direction)

The update has the values of ``torch.optim.Muon``, which takes whole parameters alone and computes in bf16 alone. This
one also steps the shards of ZeRO and of tensor parallelism, see ``matrix_parts``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megachiar.config.sections import MuonConfig
from megachiar.engine.matrix_parts import MatrixPart, MatrixParts
from megachiar.model.dtypes import DTYPES

MOMENTUM = "momentum_buffer"
"""Name of Muon's running mean of the gradient, in torch's optimizer state and in checkpoints."""
MATRICES = "matrices"
"""Key of a parameter group that Muon steps."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's author: the steepest quintic at 0 that keeps values near 1
_SMALLEST_NORM = 1e-7


def orthogonalised(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the matrix (o, i) with all singular values brought near 1, by Newton-Schulz iterations in its own dtype.

    Five iterations bring singular values of at least 0.002 times the Frobenius norm to between 0.68 and 1.21. Smaller
    ones come less near, and a matrix of zeros stays zero.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def learning_rate_scale(rows: int, columns: int, adjust_lr_fn: str) -> float:
    """Return the factor of the learning rate for a matrix (rows, columns), by ``optimizer.muon.adjust_lr_fn``."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


class MuonAdamW(torch.optim.Optimizer):
    """Muon over one group of matrices, and AdamW over the other groups.

    Args:
        matrices: parameter group of the matrices, with ``weight_decay``.
        adamw: the optimizer of all other parameters, or None where there are none. Its groups become groups of this
            optimizer, which keeps the state of both.
        config: momentum, iterations and their dtype.
    """

    def __init__(self, matrices: dict[str, Any], adamw: torch.optim.Optimizer | None, lr: float, config: MuonConfig):
        self.config = config
        self.adamw = adamw
        self.parts: MatrixParts | None = None
        others = adamw.param_groups if adamw is not None else []
        super().__init__([{**matrices, "lr": lr, MATRICES: True}, *others], {})

    def place(self, parts: MatrixParts) -> None:
        """Tell where the matrices lie in the tensors that are stepped; called once, after DeepSpeed has laid them."""
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step all groups that ``param_groups`` has now: DeepSpeed shows one at a time under ZeRO 1 and 2."""
        others = [group for group in self.param_groups if not group.get(MATRICES)]
        if others:
            assert self.adamw is not None
            self.adamw.param_groups, self.adamw.state = others, self.state
            self.adamw.step()
        for group in self.param_groups:
            if group.get(MATRICES):
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        assert self.parts is not None, "nobody has said where the matrices lie"
        for tensor in group["params"]:
            if tensor.grad is not None:
                state = self.state[tensor]
                if MOMENTUM not in state:
                    state[MOMENTUM] = torch.zeros_like(tensor.grad)
                state[MOMENTUM].lerp_(tensor.grad, 1 - self.config.momentum)
                tensor.mul_(1 - group["lr"] * group["weight_decay"])
        for part, direction in self.parts.exchange(self._direction, DTYPES[self.config.ns_dtype]):
            self._step_part(part, direction, group["lr"])
            del direction  # before the next one is made

    def _direction(self, part: MatrixPart) -> torch.Tensor:
        """Return the direction (n,) of the elements that this rank steps."""
        assert part.tensor is not None
        gradient, buffer = part.local(part.tensor.grad), part.local(self.state[part.tensor][MOMENTUM])
        return gradient.lerp(buffer, self.config.momentum) if self.config.nesterov else buffer

    def _step_part(self, part: MatrixPart, direction: torch.Tensor, lr: float) -> None:
        """Step this rank's elements by the direction of all elements of its part of a parameter."""
        assert self.parts is not None
        blocks = self.parts.whole(part, direction).chunk(part.blocks)
        update = torch.cat([orthogonalised(block, self.config.ns_steps) for block in blocks])
        rows, columns = blocks[0].shape
        scale = learning_rate_scale(rows, columns, self.config.adjust_lr_fn)
        part.local(part.tensor).add_(part.cut(self.parts.own(part, update)), alpha=-lr * scale)
