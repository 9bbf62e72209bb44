"""Medians, and ratios within a round."""

from __future__ import annotations

import pytest

from benchmarks.fsbench.measures import Measure

from .results import BASE, OURS, measure


def test_units() -> None:
    assert measure("a", 0.002, 0.004).value(OURS) == pytest.approx(80)  # µs for each of 100 operations
    assert measure("a", 0.002, 0.004, unit="ms").value(OURS) == pytest.approx(8)
    assert measure("a", 2e6, 4e6, unit="MB").value(OURS) == pytest.approx(8)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is slow for one round is slow for all: the ratio does not change."""
    assert measure("a", 1, 3).ratios(OURS, BASE) == pytest.approx([3, 3, 3])


def test_a_round_that_one_missed_has_no_ratio() -> None:
    one = Measure("a", "a", 1, "us", "", {BASE: {0: 1.0, 1: 10.0, 2: 1.0}, OURS: {0: 2.0, 2: 3.0}})
    assert one.ratios(OURS, BASE) == [2, 3]


def test_a_wrong_result_takes_all_times_away() -> None:
    one = measure("a", 1, 3)
    one.wrong[OURS] = "wrong content"
    assert one.value(OURS) is None
    assert one.ratio(OURS, BASE) is None


def test_nobody_counted_is_not_none_were_sent() -> None:
    one = measure("a", 1, 3)
    assert one.requests_each(OURS) is None
    one.requests[OURS] = {}
    assert one.requests_each(OURS) == 0
    one.requests[OURS] = {"LOOKUP": 100, "OPEN": 50}
    assert one.requests_each(OURS) == 1.5
