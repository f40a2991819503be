"""The section ``reliability:`` of a run's YAML file: how the run notices that something is wrong."""

from __future__ import annotations

from pydantic import PositiveInt

from megachiar.config.section import Section


class ReliabilityConfig(Section):
    check_every: PositiveInt | None = 100
    """Steps between comparisons of the ranks that must agree: weights of replicas, replicated weights and routes of
    tensor-parallel ranks, tied weights of pipeline stages, and samples. The ranks are compared before the first step
    and before every save as well; null compares only then."""
