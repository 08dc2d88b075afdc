"""The interval against scipy's, its level on data whose truth is known, and its refusals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rag_kit.compare.statistics import FEWEST_DIFFERING, paired_interval


@pytest.mark.parametrize("n", [8, 60, 400])
def test_agrees_with_scipy(n):
    values = np.random.default_rng(7).beta(0.5, 0.5, n) - 0.3
    ours = paired_interval(values.tolist())
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=width / 25)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=width / 25)


def test_same_seed_same_interval():
    values = [0.0, 1.0, 0.5, -0.25] * 5
    assert paired_interval(values) == paired_interval(values)
    assert paired_interval(values) != paired_interval(values, seed=1)


def test_without_an_effect_about_one_in_twenty_clears_zero():
    rng = np.random.default_rng(11)
    noise = rng.choice([-1.0, 0.0, 1.0], (300, 80))
    false_alarms = sum(paired_interval(row.tolist(), resamples=1000).clears_zero for row in noise)
    assert 3 <= false_alarms <= 30  # 15 expected


def test_few_pairs_show_nothing_however_narrow():
    assert FEWEST_DIFFERING == 6  # 2 / 2**5 > 0.05 >= 2 / 2**6
    assert not paired_interval([1.0] * 5).clears_zero
    assert not paired_interval([1.0] * 5 + [0.0] * 200).clears_zero
    assert paired_interval([1.0] * 6).clears_zero
    assert paired_interval([-1.0] * 6).clears_zero


def test_no_pairs():
    nothing = paired_interval([])
    assert nothing.n == 0 and math.isnan(nothing.mean) and not nothing.clears_zero


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_bounds(values):
    found = paired_interval(values, resamples=200)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found.n == len(values)
    assert not paired_interval([0.0] * len(values), resamples=50).clears_zero
