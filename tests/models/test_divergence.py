"""Properties that a measure of difference must have, and values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_kit.models.divergence import TOP, divergence

LOGITS = st.lists(st.floats(-20, 20), min_size=4, max_size=4)
ROWS = st.lists(LOGITS, min_size=1, max_size=5)


def normal(logits: list[float]) -> np.ndarray:
    row = np.array(logits)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def named(row: np.ndarray, count: int) -> dict[int, float]:
    return {int(token): float(row[token]) for token in np.argsort(-row)[:count]}


@given(ROWS)
def test_a_model_does_not_differ_from_itself(logits: list[list[float]]) -> None:
    rows = [normal(one) for one in logits]
    short = [named(row, 2) for row in rows]
    for same in (divergence(rows, rows), divergence(short, short)):
        assert (same.kl, same.argmax, same.top20, same.positions) == (0.0, 1.0, 0.0, len(rows))


@given(st.lists(st.tuples(LOGITS, LOGITS), min_size=1, max_size=5), st.permutations(range(4)))
def test_it_is_never_negative_and_does_not_depend_on_the_numbering(
    logits: list[tuple[list[float], list[float]]], order: list[int]
) -> None:
    ours, theirs = ([normal(pair[at]) for pair in logits] for at in (0, 1))
    whole = divergence(ours, theirs)
    assert whole.kl >= 0 and whole.top20 >= 0 and 0 <= whole.argmax <= 1
    renamed = divergence([row[order] for row in ours], [row[order] for row in theirs])
    assert (renamed.kl, renamed.top20) == pytest.approx((whole.kl, whole.top20))
    every = divergence([named(row, 4) for row in ours], [named(row, 4) for row in theirs])
    assert (every.kl, every.top20) == pytest.approx((whole.kl, whole.top20), abs=1e-6)


@given(st.lists(st.floats(-5, 5), min_size=30, max_size=30), st.floats(0.0, 1.0))
def test_few_named_tokens_never_say_more_than_all_where_they_are_the_same(
    logits: list[float], shift: float
) -> None:
    row = normal(logits)
    order = np.argsort(-row)
    moved = np.array(logits)
    moved[order[0]] += shift  # which stays the most probable, so that both name the same tokens
    other = normal(list(moved))
    few = divergence(
        [{int(t): float(row[t]) for t in order[:10]}], [{int(t): float(other[t]) for t in order[:10]}]
    )
    assert few.kl <= divergence([row], [other]).kl + 1e-9


def test_values_worked_out_by_hand() -> None:
    fair, biased = np.log([0.5, 0.5]), np.log([0.75, 0.25])
    found = divergence([fair, biased], [biased, biased])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found.kl == pytest.approx(expected / 2)
    assert found.top20 == pytest.approx(math.log(2))
    assert divergence([fair], [np.log([0.2, 0.8])]).argmax == 0
    never = divergence([np.log([1.0, 1e-30])], [np.array([-np.inf, 0.0])])
    assert never.kl == math.inf and never.argmax == 0


def test_a_token_that_the_other_does_not_name_counts_as_its_least() -> None:
    apart = divergence([{1: math.log(0.9)}], [{2: math.log(0.9), 3: math.log(0.01)}])
    assert apart.kl == pytest.approx(0.9 * math.log(0.9 / 0.01) + 0.1 * math.log(0.1 / 0.99))
    assert apart.top20 == pytest.approx(math.log(90))


def test_only_the_twenty_most_probable_are_compared_one_by_one() -> None:
    row = normal(list(-np.arange(30.0)))
    other = row.copy()
    other[TOP:] -= 5.0
    assert divergence([row], [other]).top20 == pytest.approx(0.0, abs=1e-9)


def test_what_cannot_be_compared_is_refused() -> None:
    row = np.log([0.5, 0.5])
    for ours, theirs in (([], []), ([row], [row, row])):
        with pytest.raises(ValueError, match="positions"):
            divergence(ours, theirs)
    with pytest.raises(ValueError, match=r"rows of \(2,\) and \(3,\)"):
        divergence([row], [np.log([0.2, 0.3, 0.5])])
