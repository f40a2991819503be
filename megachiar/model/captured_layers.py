"""Layers whose forward and backward pass are captured once and then replayed, so that a host starts one graph for many.

    embedding -> segment 1 -> segment 2 -> ... -> norm, loss         each segment: some layers that follow each other
                   |  ^         |  ^
      forward: copy x in, replay; results lie where the capture put them
      backward: replay; x.grad lies where the segment before it reads it, gradients of weights are copied out

What is around the segments runs as it does without them: DeepSpeed's hooks of weights, the accumulation of gradients,
loss scales, clipping and the optimizer. The first micro-batches of a shape run layer by layer, which loads kernels and
fills caches; then all its segments are captured. Their numbers are those of a run without graphs.

The activations of one micro-batch lie in memory that the next one takes: each backward pass comes before the next
forward pass.

Shapes: N = rows of the micro-batch, d = channels.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from megachiar.errors import UserError
from megachiar.kernels.graph_capture import Capturer, capturer
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.layer import LayerOutput, RoutedLayer
from megachiar.model.layer_stack import run_layers
from megachiar.phases import phase

WARM_UP = 3
"""Micro-batches of a shape that run before it is captured."""
SHAPES = 4
"""Shapes of micro-batches that are captured; others run layer by layer."""

_TENSOR = object()
"""What stands for a tensor among the other results of a segment, which stay as they were at its capture."""

Results = tuple[torch.Tensor, list[LayerOutput]]
"""Hidden states (N, d) after some layers, and the outputs of these without their hidden states."""


class CapturedLayers:
    """The layers of a model, in segments that are captured for each shape of micro-batches.

    Args:
        layers: all layers of the model.
        segment_length: how many of them a segment has; the last one may have fewer.
        device: that the model is on in training.
    """

    def __init__(self, layers: Sequence[nn.Module], segment_length: int, device: torch.device):
        starts = range(0, len(layers), segment_length)
        self._segments = [_Segment(layers[start : start + segment_length], start) for start in starts]
        self._device = device
        self._capturer = capturer(device)
        self._seen: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _CapturedShape] = {}
        self._modules = [module for segment in self._segments for module in segment.modules()]
        self._held: list[tuple[int, int]] = []
        self._micro_batches = _Count()

    def run(self, x: torch.Tensor, layout: BatchLayout) -> Results:
        """Run all layers for the rows (N, d) of a micro-batch, whose backward pass comes before the next call.

        Raises:
            UserError: an operation of a layer cannot be captured.
        """
        layout = layout.with_document_rows()
        shape = self._shape(x, layout)
        self._forget_moved_weights()
        self._micro_batches.number += 1
        self._seen[shape] += 1
        if shape not in self._captured and self._seen[shape] > WARM_UP and len(self._captured) < SHAPES:
            self._captured[shape] = self._capture(x, layout)
        segments: Sequence[Callable[[torch.Tensor, BatchLayout], Results]] = self._segments
        if (captured := self._captured.get(shape)) is not None:
            captured.set_layout(layout)
            segments = captured.segments
        outputs = []
        for segment in segments:
            x, of_layers = segment(x, layout)
            outputs += of_layers
        return x, outputs

    def _capture(self, x: torch.Tensor, layout: BatchLayout) -> _CapturedShape:
        try:
            return _CapturedShape(self._segments, x, layout, self._capturer, self._micro_batches)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # the end of a capture that failed says only that it has
                cause = cause.__context__
            reason = str(cause).partition("\n")[0]
            raise UserError(
                "training.cuda_graphs", f"the layers cannot be captured: {reason}", "set it to null"
            ) from error

    def _shape(self, x: torch.Tensor, layout: BatchLayout) -> Hashable:
        """Return all that a capture holds as it was: shapes, numbers of the host, and the bounds of routers."""
        parts = (
            (part.shape, part.dtype) if torch.is_tensor(part) else part for part in pytree.tree_leaves((x, layout))
        )
        routed = (layer for segment in self._segments for layer in segment.routed_layers())
        return tuple(parts), tuple(layer.router.bounds for layer in routed)

    def _forget_moved_weights(self) -> None:
        """Give up what was captured for weights that lie elsewhere now."""
        held = [
            (id(tensor), tensor.data_ptr())
            for module in self._modules  # their dictionaries: to walk through all modules takes ten times as long
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        if held != self._held and self._captured:
            warnings.warn("training.cuda_graphs: weights lie elsewhere now, and layers are captured anew", stacklevel=2)
            self._captured.clear()
            self._capturer = capturer(self._device)  # the memory of the old one is freed with what is left in it
        self._held = held


class _Count:
    """The number of micro-batches so far, whatever their shapes: they share the memory of their activations."""

    def __init__(self) -> None:
        self.number = 0


class _Segment(nn.Module):
    """Layers that follow each other. The model has them too; here they are called together."""

    def __init__(self, layers: Sequence[nn.Module], first: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.name = f"layers {first} to {first + len(layers) - 1}"

    def forward(self, x: torch.Tensor, layout: BatchLayout) -> Results:
        """Run the layers for rows (N, d)."""
        return run_layers(list(self.layers), x, layout, cache=None, interval=None)

    def routed_layers(self) -> list[RoutedLayer]:
        """Return those of the layers that have a router."""
        return [layer for layer in self.layers if isinstance(layer, RoutedLayer)]


class _CapturedShape:
    """All segments, captured for micro-batches of one shape.

    Attributes:
        segments: the segments in the order of the layers, each a function of hidden states and layout.
    """

    def __init__(
        self,
        segments: Sequence[_Segment],
        x: torch.Tensor,
        layout: BatchLayout,
        capturer: Capturer,
        micro_batches: _Count,
    ):
        own_layout = pytree.tree_map_only(torch.Tensor, torch.clone, layout)
        self._tensors = [part for part in pytree.tree_leaves(own_layout) if torch.is_tensor(part)]
        self.set_layout(layout)  # loads the kernels that copy, which no capture may do
        self.segments: list[_CapturedSegment] = []
        entering = x.detach().clone()
        for segment in segments:
            self.segments.append(_CapturedSegment(segment, entering, own_layout, capturer, micro_batches))
            entering = self.segments[-1].hidden_states
        flat = _FlatGradients([captured.weights for captured in self.segments])
        gradient = torch.zeros_like(entering)
        for captured in reversed(self.segments):
            gradient = captured.capture_backward(gradient, flat, capturer)

    def set_layout(self, layout: BatchLayout) -> None:
        """Let the next replays work on a micro-batch of ``layout``."""
        given = [part for part in pytree.tree_leaves(layout) if torch.is_tensor(part)]
        if given:
            torch._foreach_copy_(self._tensors, given)


class _FlatGradients:
    """Memory for the gradients of one segment's weights at a time, one tensor for each dtype.

    All segments share it: their gradients are copied out before the next segment writes its own.
    """

    def __init__(self, weights_of_segments: Sequence[Sequence[torch.Tensor]]):
        self._memory: dict[torch.dtype, torch.Tensor] = {}
        for weights in weights_of_segments:
            for dtype in {weight.dtype for weight in weights}:
                alike = [weight for weight in weights if weight.dtype == dtype]
                count = sum(weight.numel() for weight in alike)
                if dtype not in self._memory or len(self._memory[dtype]) < count:
                    self._memory[dtype] = alike[0].detach().new_zeros(count)
        for weights in weights_of_segments:  # loads the kernels that copy, which no capture may do
            torch._foreach_copy_(self.views(weights), [weight.detach() for weight in weights])

    def views(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return a part of the memory for the gradient of each weight."""
        return _cut(self._memory, weights)

    def copies(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradients of the weights, in memory that is theirs alone."""
        counts: Counter[torch.dtype] = Counter()
        for weight in weights:
            counts[weight.dtype] += weight.numel()
        return _cut({dtype: self._memory[dtype][:count].clone() for dtype, count in counts.items()}, weights)


def _cut(memory: dict[torch.dtype, torch.Tensor], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cut one tensor for each dtype into parts of the weights' shapes, in their order."""
    parts: list[torch.Tensor | None] = [None] * len(weights)
    for dtype, whole in memory.items():
        alike = [index for index, weight in enumerate(weights) if weight.dtype == dtype]
        sizes = [weights[index].numel() for index in alike]
        for index, part in zip(alike, whole[: sum(sizes)].split(sizes), strict=True):
            parts[index] = part.view(weights[index].shape)
    return parts  # type: ignore[return-value]  # each weight has a dtype


class _CapturedSegment:
    """A segment whose passes are replayed.

    Attributes:
        hidden_states: (N, d) after the segment, where each replay puts them.
        weights: those of its layers; after the capture of the backward pass those of them that have a gradient.

    Args:
        segment: the layers.
        x: hidden states (N, d), from where each replay of the forward pass reads them.
        layout: of the micro-batch; its tensors too are read from where they lie.
        capturer: captures the forward pass.
        micro_batches: counts those of the model.
    """

    def __init__(
        self,
        segment: _Segment,
        x: torch.Tensor,
        layout: BatchLayout,
        capturer: Capturer,
        micro_batches: _Count,
    ):
        self._segment = segment
        self._micro_batches = micro_batches
        named = {name: weight for name, weight in segment.named_parameters() if weight.requires_grad}
        self.weights: list[torch.Tensor] = list(named.values())
        # The weights under other names: those that DeepSpeed has hooks on take no part in a capture.
        self._aliases = {name: weight.detach().requires_grad_() for name, weight in named.items()}
        self._x = x.detach().requires_grad_()

        def run() -> Results:
            return torch.func.functional_call(segment, self._aliases, (self._x, layout))

        with torch.enable_grad():
            self._replay_forward, results = capturer.capture(run)
        leaves, self._structure = pytree.tree_flatten(results)
        self._tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
        self._leaves = [_TENSOR if torch.is_tensor(leaf) else leaf for leaf in leaves]
        self._routes = [layer.last_routes for layer in segment.routed_layers()]
        self.hidden_states = self._tensors[0].detach()

    def capture_backward(self, gradient: torch.Tensor, flat: _FlatGradients, capturer: Capturer) -> torch.Tensor:
        """Capture the backward pass, which comes after the capture of all forward passes.

        Args:
            gradient: (N, d) of ``hidden_states``, from where each replay reads it.
            flat: takes the gradients of the weights.
            capturer: captures the backward pass.

        Returns:
            The gradient (N, d) of the hidden states that enter the segment, where each replay puts it.
        """
        self._differentiable = [index for index, tensor in enumerate(self._tensors) if tensor.requires_grad]
        results = [self._tensors[index] for index in self._differentiable]
        self._gradients = [gradient, *(torch.zeros_like(result) for result in results[1:])]
        self._flat = flat

        def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
            entering, *found = torch.autograd.grad(
                results, [self._x, *self._aliases.values()], self._gradients, allow_unused=True
            )
            given = {index: gradient for index, gradient in enumerate(found) if gradient is not None}
            weights = [self.weights[index] for index in given]
            torch._foreach_copy_(flat.views(weights), list(given.values()))
            return entering, weights

        self._replay_backward, (self._x_gradient, self.weights) = capturer.capture(run)
        self._tensors = [tensor.detach() for tensor in self._tensors]
        return self._x_gradient

    def __call__(self, x: torch.Tensor, layout: BatchLayout) -> Results:
        """Run the segment for rows (N, d), with the gradients of its weights; ``layout`` has been set."""
        tensors = iter(_Replayed.apply(self, x, *self.weights))
        for layer, routes in zip(self._segment.routed_layers(), self._routes, strict=True):
            layer.last_routes = routes
        leaves = [next(tensors) if leaf is _TENSOR else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._structure)

    def forward(self, x: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
        """Replay the forward pass for rows (N, d).

        Returns:
            The number of the micro-batch, and the results.
        """
        if x.data_ptr() != self._x.data_ptr():
            self._x.detach().copy_(x)
        with phase(self._segment.name):
            self._replay_forward()
        return self._micro_batches.number, [tensor.detach() for tensor in self._tensors]

    def backward(self, number: int, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Replay the backward pass of micro-batch ``number``.

        Args:
            number: of the micro-batch, which must be the last one.
            gradients: of its results; None where there is none.

        Returns:
            The gradients of the hidden states that entered, and of each weight.
        """
        assert number == self._micro_batches.number, "a later micro-batch has taken the memory of the activations"
        for own, index in zip(self._gradients, self._differentiable, strict=True):
            given = gradients[index]
            if given is None:
                own.zero_()
            elif given.data_ptr() != own.data_ptr():
                own.copy_(given)
        self._replay_backward()
        return [self._x_gradient.detach(), *self._flat.copies(self.weights)]

    def without_gradient(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return those of the results that have no gradient."""
        return [result for index, result in enumerate(results) if index not in self._differentiable]


class _Replayed(torch.autograd.Function):
    """A replayed segment as one function of hidden states and weights, so that weights get gradients and hooks run."""

    @staticmethod
    def forward(ctx, segment, x, *weights):
        ctx.set_materialize_grads(False)
        ctx.segment = segment
        ctx.number, results = segment.forward(x)
        ctx.mark_non_differentiable(*segment.without_gradient(results))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return None, *ctx.segment.backward(ctx.number, gradients)
