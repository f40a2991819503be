"""Mean, spread and paired differences against numpy's and scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megachiar.sweeps.statistics import paired_difference, spread, t_probability, t_quantile


@pytest.mark.parametrize("freedom", [*range(1, 14), 30, 101])
def test_students_t_is_scipys(freedom):
    for t in (0.0, 0.2, 1.0, 2.5, 40.0):
        assert t_probability(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-13)
    for probability in (0.5, 0.6, 0.975, 0.9995):
        assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-12)


def test_spread_is_numpys():
    values = np.random.default_rng(0).normal(4, 0.1, 7)
    found = spread(values.tolist())
    assert found.n == 7 and found.mean == pytest.approx(values.mean())
    assert found.deviation == pytest.approx(values.std(ddof=1))
    assert (found.least, found.most) == (values.min(), values.max())
    assert spread([2.0]) == (1, 2.0, None, 2.0, 2.0)


def test_differences_are_paired_by_seed():
    """scipy's test of paired samples gives the interval; a seed that one of them lacks does not count."""
    rng = np.random.default_rng(1)
    common = rng.normal(0, 1, 5)
    one, other = common + 0.3 + rng.normal(0, 0.01, 5), common + rng.normal(0, 0.01, 5)
    interval = stats.ttest_rel(one, other).confidence_interval(0.95)
    found = paired_difference({**dict(enumerate(one)), 77: 1e9}, {**dict(enumerate(other)), 88: -1e9})
    assert found.n == 5 and found.mean == pytest.approx((one - other).mean())
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.high - found.low < 0.1, "what the seeds have in common cancels"
    assert paired_difference({1: 2.0}, {1: 1.5}) == (1, 0.5, None, None, None)
    assert paired_difference({1: 2.0}, {2: 1.5}) is None
