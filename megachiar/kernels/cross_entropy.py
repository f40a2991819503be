"""The cross-entropy of a linear head, chunk by chunk, so that all logits never exist at once.

Shapes: N = rows, n = rows of a chunk, d = channels, V = vocabulary, or a rank's part of it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels import gpu, triton_cross_entropy
from megachiar.kernels.ignored_target import IGNORED_TARGET

CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""The most bytes that the fp32 logits of one chunk of rows may take, by the type of the device; other devices are
treated as a CPU. Each chunk adds to the gradient of the whole weight, which costs a GPU much where chunks are small."""
CACHED_BYTES, CACHED_ROWS = 32 * 2**20, 512
"""On a CPU a chunk has at most CACHED_BYTES, which a cache may hold, unless that leaves fewer than CACHED_ROWS rows."""

PAGE, SPARE = 4096, 64
"""On a CPU, rows of logits whose bytes are a multiple of PAGE get SPARE more columns. Rows that all start at one offset
in a page would compete for one part of the cache. The head's products would take 4 to 14 % longer (V 8192 to 32768 on
Zen 3)."""

SMALLEST_SHARE = 1e-30
"""A probability of a softmax in fp32 whose logarithm is exact enough; much smaller ones lose digits."""


class Vocabulary(Protocol):
    """The part of a vocabulary whose weights this process has."""

    @property
    def first(self) -> int:
        """The token id of the first row of the weight."""

    def merge(self, scale: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn log-sum-exp (n,) and the target's logit (n,), 0 where another part has it, into those of all parts."""


class CrossEntropy(NamedTuple):
    """Losses in nats.

    Attributes:
        loss: scalar fp32, the mean over targets that count.
        token_losses: (N,) fp32 without gradient; 0 for rows that do not count.
    """

    loss: torch.Tensor
    token_losses: torch.Tensor


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, part: Vocabulary | None = None
) -> CrossEntropy:
    """Compute the cross-entropy of ``softmax(hidden @ weight.T)`` against ``targets``.

    The forward pass computes the gradients too, chunk by chunk while it has the logits, so that neither pass keeps
    logits. Softmax and losses are in fp32 (fp64 for fp64 input), whatever the type of the weights.

    Args:
        hidden: (N, d).
        weight: (V, d), or the rows of ``part``.
        targets: (N,) int64 in [0, V), or -100 for rows that do not count. If none counts, the loss is 0.
        part: the part of the vocabulary that ``weight`` has; None for all of it. The gradient of ``hidden`` is then
            this part's addend.
    """
    return CrossEntropy(*_LinearCrossEntropy.apply(hidden, weight, targets, part))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, part_of):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needed = any(ctx.needs_input_grad[:2])
        counted = targets != IGNORED_TARGET
        count = counted.sum().clamp_min(1)
        losses = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if needed else None
        of_weight = torch.zeros_like(weight, dtype=wide) if needed else None
        rows = _rows_of_chunk(hidden.device.type, len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            losses[part], slope = _losses_and_slope(hidden[part], weight, targets[part], counted[part], part_of, wide)
            if of_hidden is not None and of_weight is not None:
                # This is d loss / d logits times the number of targets: within the range of fp16 before loss scaling.
                torch.mm(slope, weight, out=of_hidden[part])
                if slope.dtype == wide:
                    torch.addmm(of_weight, slope.mT, hidden[part], out=of_weight)
                else:
                    of_weight += slope.mT @ hidden[part]
            del slope  # before the next chunk's logits
        ctx.save_for_backward(of_hidden, of_weight, count)
        ctx.mark_non_differentiable(losses)
        return losses.sum() / count, losses

    @staticmethod
    @once_differentiable
    def backward(ctx, of_loss, _):
        of_hidden, of_weight, count = ctx.saved_tensors
        factor = of_loss / count
        return (of_hidden * factor).to(of_hidden.dtype), (of_weight * factor).to(of_hidden.dtype), None, None


def _rows_of_chunk(device: str, vocabulary: int) -> int:
    """Return how many rows a chunk has on a device of this type."""
    rows = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * vocabulary)
    if device == "cpu":
        rows = min(rows, max(CACHED_ROWS, CACHED_BYTES // (4 * vocabulary)))
    return max(1, rows)


def _columns(device: str, vocabulary: int, width: int) -> int:
    """Return the columns of a chunk's logits, which take ``width`` bytes each."""
    spare = device == "cpu" and width >= 4 and vocabulary * width % PAGE == 0
    return vocabulary + SPARE * spare


def buffer_bytes(
    rows: int, channels: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu", by_triton: bool = False
) -> int:
    """Return the peak bytes that the loss allocates, without its inputs and the gradient of ``hidden``.

    It is the largest of three sums, one for each moment. All include the weight's gradient (V, d) in fp32, and these:

        softmax of a chunk      logits (n, V) and softmax (n, V) in fp32; logits of 16 bits also as a copy in fp32
        gradient of a chunk     slope (n, V); of 16 bits also an addend (V, d) of the weight's gradient
        backward pass           both gradients times that of the loss: (N, d), (V, d) in fp32; also (V, d) in 16 bits

    Triton kernels make the slope in the logits' place.

    Args:
        rows, channels, vocabulary: N, d and V (of the rank's part).
        dtype: of ``hidden`` and the weight.
        device: its type.
        by_triton: whether Triton kernels run.
    """
    width, wide = dtype.itemsize, max(4, dtype.itemsize)
    chunk = min(rows, _rows_of_chunk(device, vocabulary)) * _columns(device, vocabulary, width)
    of_weight, small = vocabulary * channels, width < wide
    if by_triton:
        slope = softmax = chunk * width
    else:
        softmax = chunk * (width + wide * (2 if small else 1))
        slope = chunk * width
    addend = slope + of_weight * width * small
    scaled = of_weight * (wide + width * small) + rows * channels * width
    return of_weight * wide + max(softmax, addend, scaled)


def _losses_and_slope(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    counted: torch.Tensor,
    part_of: Vocabulary | None,
    wide: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the losses (n,) of a chunk and their slope by its logits (n, V), in the type of the weight."""
    logits = _logits(hidden, weight)
    by_triton = gpu.has_kernels(logits.device) and triton_cross_entropy.supports(logits)
    target = targets - (part_of.first if part_of is not None else 0)
    if part_of is not None:
        target.masked_fill_(target >= len(weight), -1)
    losses, slope = (_by_triton if by_triton else _by_torch)(logits, target, counted, part_of, wide)
    return losses, slope[:, : len(weight)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute logits (n, V); SPARE columns of -inf may follow them."""
    vocabulary = len(weight)
    columns = _columns(hidden.device.type, vocabulary, hidden.element_size())
    if columns == vocabulary:
        return hidden @ weight.mT
    logits = hidden.new_empty(len(hidden), columns)
    logits[:, vocabulary:] = -torch.inf
    torch.mm(hidden, weight.mT, out=logits[:, :vocabulary])
    return logits


def _by_torch(
    logits: torch.Tensor, target: torch.Tensor, counted: torch.Tensor, part_of: Vocabulary | None, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the losses of a chunk and their derivatives.

    Args:
        logits: (n, V); columns of -inf may follow.
        target: (n,) int64, by the rows of the weight; negative where another part of the vocabulary has it, or none.
        counted: (n,) bool, whether a row counts.
        part_of: the part of the vocabulary; None for all of it.
        wide: type of softmax and losses.

    Returns:
        Losses (n,), and their derivatives by the logits, in the shape and type of ``logits``; 0 for rows that do not
        count.
    """
    target = target[:, None]
    elsewhere = target < 0
    target = target.masked_fill(elsewhere, 0)
    slope = torch.softmax(logits, -1, dtype=wide)
    at_target, share = logits.gather(-1, target).to(wide), slope.gather(-1, target)
    # The logarithm of the sum comes from a token whose share has not vanished: the target, or the likeliest one.
    if logits.device.type == "cpu" and share.amin() > SMALLEST_SHARE:
        scale = at_target - share.log()
    else:
        scale = logits.amax(-1, keepdim=True).to(wide) - slope.amax(-1, keepdim=True).log()
    at_target = at_target.masked_fill_(elsewhere, 0)
    factor = counted[:, None].to(wide)
    if part_of is not None:
        scale_of_shard = scale
        scale, at_target = (t[:, None] for t in part_of.merge(scale[:, 0], at_target[:, 0]))
        factor = factor * (scale_of_shard - scale).exp()
    if part_of is not None or counted.device.type != "cpu" or not counted.all():
        slope *= factor
    slope.scatter_add_(-1, target, (elsewhere.to(wide) - 1) * counted[:, None])
    return (scale - at_target).squeeze(-1).masked_fill_(~counted, 0), slope.to(logits.dtype)


def _by_triton(
    logits: torch.Tensor, target: torch.Tensor, counted: torch.Tensor, part_of: Vocabulary | None, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what ``_by_torch`` computes; the derivatives overwrite the logits."""
    scale, at_target = triton_cross_entropy.scales_and_targets(logits, target)
    if part_of is not None:
        scale, at_target = part_of.merge(scale, at_target)
    losses = (scale - at_target).masked_fill_(~counted, 0)
    return losses, triton_cross_entropy.slope_(logits, target, scale, counted)
