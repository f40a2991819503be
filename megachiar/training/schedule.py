"""The learning rate is a pure function of the step, so that checkpoints neither save nor restore it."""

from __future__ import annotations

import math

from megachiar.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 1.

    The warm-up rises linearly; step 1 already gets a share of the peak, not 0. From the end of the warm-up to
    ``decay_steps`` the rate follows the curve of ``schedule.kind``; afterwards it is the minimum.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    end = schedule.decay_steps or config.steps
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, round(end * (1 - schedule.wsd_decay_fraction)))
    taken = step - 1  # steps taken before this one
    progress = min(1.0, max(0.0, (taken - start) / max(1, end - start)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return schedule.minimum_learning_rate + (peak - schedule.minimum_learning_rate) * remaining
