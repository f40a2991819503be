"""Watch every module of a model through one step, and name the first one whose output or gradient is not finite."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class BadModule:
    """The first module with a number that is not finite.

    Attributes:
        direction: the pass in which it was found. Every number of the forward pass was finite if it is ``backward``.
        module: name of the module in the model.
        what: what is not finite: its output, the gradient of its output, or the gradient of a parameter of its own.
        micro_batch: number of the micro-batch in the step, from 0.
        before: name of the module whose output, or gradient, was the last finite one before; None for the first.
    """

    direction: Literal["forward", "backward"]
    module: str
    what: str
    micro_batch: int
    before: str | None


class ModuleTrace:
    """Context in which each output and each gradient of a model's modules is read, in the order of their computation.

    An output that a module returns beside others counts if it has a gradient or is no scalar: scalars without gradient
    are statistics, which may be nan where there is nothing to measure. The model itself is not read, since it returns
    the statistics of all layers.

    Attributes:
        first_bad: the first module that is not finite; None as long as all are.

    Args:
        model: in training mode, on one process, without recomputed activations.
        scale: factor of the gradients, which fp16 has; norms are divided by it.
    """

    def __init__(self, model: nn.Module, scale: float = 1.0):
        self.first_bad: BadModule | None = None
        self._model = model
        self._scale = scale
        self._handles: list[Any] = []
        self._last: dict[str, str] = {}
        self._micro_batch = -1
        self._calls: Counter[str] = Counter()
        self._outputs: dict[str, float] = defaultdict(float)
        self._gradients: dict[str, float] = defaultdict(float)

    def __enter__(self) -> ModuleTrace:
        self._handles.append(self._model.register_forward_pre_hook(self._begin_micro_batch))
        for name, module in self._model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._output_hook(name)))
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    self._handles.append(parameter.register_hook(self._parameter_hook(name, own)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def output_norm(self, module: str) -> float:
        """Return the L2 norm of a module's outputs in all micro-batches; of several calls in one the first counts."""
        return math.sqrt(self._outputs[module])

    def gradient_norm(self, module: str) -> float:
        """Return the L2 norm of the gradients of a module's outputs, over all micro-batches."""
        return math.sqrt(self._gradients[module]) / self._scale

    def _begin_micro_batch(self, module: nn.Module, inputs: Any) -> None:
        self._micro_batch += 1
        self._calls.clear()
        self._last.clear()

    def _output_hook(self, name: str) -> Any:
        def read(module: nn.Module, inputs: Any, output: Any) -> None:
            self._calls[name] += 1
            call = "" if self._calls[name] == 1 else f" (call {self._calls[name]} of the pass)"
            for tensor in _numbers(output):
                squares = self._read("forward", name, f"its output{call}", tensor)
                self._outputs[name] += 0.0 if call else squares
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(name, call))

        return read

    def _gradient_hook(self, name: str, call: str) -> Any:
        def read(gradient: torch.Tensor) -> None:
            squares = self._read("backward", name, f"the gradient of its output{call}", gradient)
            self._gradients[name] += 0.0 if call else squares

        return read

    def _parameter_hook(self, name: str, own: str) -> Any:
        def read(gradient: torch.Tensor) -> None:
            self._read("backward", name, f"the gradient of its {own}", gradient)

        return read

    def _read(self, direction: Literal["forward", "backward"], name: str, what: str, tensor: torch.Tensor) -> float:
        """Read a tensor and return its sum of squares."""
        if tensor.isfinite().all():
            self._last[direction] = name
        elif self.first_bad is None:
            self.first_bad = BadModule(direction, name, what, self._micro_batch, self._last.get(direction))
        return tensor.detach().double().square().sum().item()


def _numbers(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a module's output that are no statistics, whatever they are nested in."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and (output.requires_grad or output.ndim):
            yield output
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _numbers(part)
    elif isinstance(output, dict) or is_dataclass(output):
        yield from _numbers(list((output if isinstance(output, dict) else vars(output)).values()))
