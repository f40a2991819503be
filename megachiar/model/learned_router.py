"""The head of a learned router, which predicts what attention is worth to a token, and the gradient that teaches it.

The value of attention for a token is the loss with DCT mixing minus the loss with attention, all other routes held. To
first order it is what the backward pass knows once both results of the token are there:

    value = <d loss / d y, result of DCT mixing - result of attention>        y: the result that the token goes on with

In training both operators are computed for a random few of the tokens (``router.explore``), and the head is fitted to
their values by least squares. The prediction orders the tokens. A running threshold then takes as many of the highest
as ``router.target_share`` says: of all routers with this share, the one that knows the expected values loses least.

    prediction = w . f / sqrt(d) + b        f = [LN(x); (H - mean) / deviation], of H of white noise at this width

The root of d keeps a step of the optimizer, which moves each of the d weights by about the learning rate, from moving a
prediction by more than its own size: a value says little about its row, and thousands of them have to be averaged.
Nothing flows back into the hidden states: the head reads them and does not shape them.

Shapes: m = this rank's rows, n = explored rows, d = channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megachiar.kernels.spectral import white_noise_entropy
from megachiar.model.running_number import RunningNumber
from megachiar.parallel.collectives import replicated_parameter
from megachiar.parallel.linear import ReplicatedLinear
from megachiar.topology import TensorParallelGroup


class ValueHead(ReplicatedLinear):
    """A linear map of a row and its H to the predicted value of attention, in units of the values' root mean square.

    Attributes:
        mean_square: running mean square of the values that were measured, in units of the loss as it is averaged over
            tokens, squared; 0 before the first step.
        gradient_scale: factor by which gradients of a micro-batch differ from those of its mean loss.
        sums: (3,) float64 since it was set to None: of the squares of measured values and of the squared errors of
            their predictions, both in units of ``mean_square``, and how many there were; None where none was measured.

    Args:
        channels: d.
        group: the ranks that share the layer.
    """

    def __init__(self, channels: int, group: TensorParallelGroup):
        super().__init__(channels + 1, 1, group)
        self.noise = white_noise_entropy(channels)
        self.mean_square = RunningNumber(0.0)
        self.gradient_scale = 1.0
        self.sums: torch.Tensor | None = None

    def predict(self, x: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the values of rows ``x`` (m, d) with spectral entropies (m,).

        Returns:
            The predictions (m,), with a gradient of the head's weights alone; and the score (m,) without gradient,
            which orders rows as the predictions do and has a scale of its own: w . features / |w|.
        """
        mean, deviation = self.noise
        rows = F.layer_norm(x.detach().to(entropy.dtype), x.shape[1:])
        features = torch.cat([rows, ((entropy - mean) / deviation)[:, None]], 1) * x.shape[1] ** -0.5
        weight = replicated_parameter(self.weight, self.group).to(features.dtype)
        without_bias = F.linear(features, weight)[:, 0]
        prediction = without_bias + replicated_parameter(self.bias, self.group).to(features.dtype)
        length = weight.detach().norm().clamp_min(torch.finfo(features.dtype).tiny)
        return prediction, without_bias.detach() * (x.shape[1] ** 0.5 / length)

    def forward(self, x: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return what ``predict`` returns."""
        return self.predict(x, entropy)

    def follow(self, mean_square: float, rate: float) -> None:
        """Move the running mean square towards that of a step; the first step sets it."""
        running = self.mean_square.value
        running.copy_(torch.where(running > 0, running + rate * (mean_square - running), mean_square))

    def add_sums(self, values: torch.Tensor, errors: torch.Tensor) -> None:
        """Add measured values (n,) and the errors (n,) of their predictions, in units of the mean loss."""
        count = torch.full((), float(len(values)), dtype=torch.float64, device=values.device)
        sums = torch.stack([values.double().square().sum(), errors.double().square().sum(), count])
        self.sums = sums if self.sums is None else self.sums + sums


def learn_values(
    head: ValueHead, taken: torch.Tensor, difference: torch.Tensor, prediction: torch.Tensor, rows: int
) -> torch.Tensor:
    """Return ``taken`` unchanged, and let its gradient teach the head.

    Args:
        head: that made the predictions.
        taken: results (n, d) of the operators that explored rows go on with.
        difference: (n, d) without gradient, result of attention minus result of DCT mixing.
        prediction: (n,) of the head.
        rows: N, rows of the micro-batch, by which the loss is averaged.
    """
    return _LearnValues.apply(taken, difference, prediction, head, rows)


class _LearnValues(torch.autograd.Function):
    """The identity, whose backward pass measures values and gives the head the gradient of its squared error.

    The gradient is ``(prediction * root - value)`` in the units in which values come from the backward pass, so that it
    has the scale of the other gradients of the model. Before there is a root mean square it is zero.
    """

    @staticmethod
    def forward(ctx, taken, difference, prediction, head, rows):
        ctx.save_for_backward(difference, prediction)
        ctx.head, ctx.rows = head, rows
        return taken.view_as(taken)

    @staticmethod
    def backward(ctx, gradient):
        difference, prediction = ctx.saved_tensors
        head, exact = ctx.head, prediction.dtype
        # A row's share of the mean loss is 1 / rows of its own loss: values are told in units of the latter.
        unit = ctx.rows / head.gradient_scale
        values = -(gradient.to(exact) * difference.to(exact)).sum(-1) * unit
        root = head.mean_square.value.to(exact).sqrt()
        errors = (prediction * root - values) * (root > 0)
        head.add_sums(values, errors)
        return gradient, None, errors / unit, None, None
