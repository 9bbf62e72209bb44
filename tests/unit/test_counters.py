"""What a mount counts: the bucket a time lands in, and what Python's and a gate's counters make together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfs.fuse import counters
from layerfs.fuse.counters import Counters
from layerfs.fuse.statistics import requests


def histogram(*times_ns: int) -> list[int]:
    """Of requests that took so long."""
    counted = Counters()
    with pytest.MonkeyPatch.context() as patch:
        for each in times_ns:
            patch.setattr(counters, "perf_counter_ns", lambda each=each: 1000 + each)
            counted.answered("lookup", 1000)
    return counted.histograms()["lookup"]


@pytest.mark.parametrize(
    ("ns", "bucket"),
    [
        (0, 0),
        (999, 0),
        (1_000, 1),
        (1_999, 1),
        (2_000, 2),
        (3_999, 2),
        (4_000, 3),
        (1_023_999, 10),
        (1_024_000, 11),
        (60 * 10**9, 26),
    ],
)
def test_edges(ns: int, bucket: int) -> None:
    assert histogram(ns) == [0] * bucket + [1]


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_every_time_has_its_bucket(ns: int) -> None:
    bucket = len(histogram(ns)) - 1
    assert ns < 2**bucket * 1000 and (bucket == 0 or ns >= 2 ** (bucket - 1) * 1000)


def test_kinds_are_apart_and_an_unused_one_is_absent() -> None:
    counted = Counters()
    assert counted.histograms() == {}
    began = counters.perf_counter_ns()
    for kind in ("open", "read", "read"):
        counted.answered(kind, began)
    assert {kind: sum(times) for kind, times in counted.histograms().items()} == {"open": 1, "read": 2}


def test_without_a_gate() -> None:
    assert requests({"read": [0, 2], "lookup": [1]}, {}) == {
        "lookup": {"native": 0, "python": 1, "native_us": [], "python_us": [1]},
        "read": {"native": 0, "python": 2, "native_us": [], "python_us": [0, 2]},
    }


def test_with_a_gate() -> None:
    gate = {
        "native.lookup": 10,
        "passed.lookup": 4,  # one is not answered yet
        "latency.lookup.2": 6,
        "latency.lookup.0": 4,
        "native.forget": 3,
        "native.batch_forget": 2,
        "passed.rename2": 1,
        "passed.init": 1,
        "native.statfs": 0,
        "entries": 5,
        "bytes": 100,
    }
    found = requests({"lookup": [0, 3], "rename": [0, 0, 1]}, gate)
    assert found == {
        "forget": {"native": 5, "python": 0, "native_us": [], "python_us": []},
        "init": {"native": 0, "python": 1, "native_us": [], "python_us": []},
        "lookup": {"native": 10, "python": 3, "native_us": [4, 0, 6], "python_us": [0, 3]},
        "rename": {"native": 0, "python": 1, "native_us": [], "python_us": [0, 0, 1]},
    }
    assert list(found) == sorted(found)
