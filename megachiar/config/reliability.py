"""The section ``reliability:`` of a run's YAML file: how the run notices that something is wrong, and what it does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megachiar.config.section import Section


class ReliabilityConfig(Section):
    check_every: PositiveInt | None = 100
    """Steps between comparisons of the ranks that must agree: weights of replicas, replicated weights and routes of
    tensor-parallel ranks, tied weights of pipeline stages, and samples. The ranks are compared before the first step
    and before every save as well; null compares only then."""
    max_skipped: PositiveInt = 20
    """Steps in a row that may be left out, because their loss or gradients are not finite or a spike, before the run
    stops. Checkpoints record the count, so that a run which is killed or requeued in between goes on counting."""
    on_spike: Literal["ignore", "skip", "rollback", "stop"] = "ignore"
    """What to do with a step whose loss or gradient norm is a spike. ignore: warn. skip: leave the step out. rollback:
    load the newest checkpoint and go on without the samples of the step. stop: end the run. A step whose numbers are
    not finite is left out in any case; rollback and stop treat it as a spike."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Steps before the present one that it is compared with. Nothing is a spike before half of them are there."""
    spike_sigma: PositiveFloat = 6.0
    """Threshold of a spike, in standard deviations above the median of the window."""
    max_rollbacks: PositiveInt = 10
    """With on_spike rollback: bad steps after which the run goes back to the same checkpoint; the next one stops it."""
