"""The figures of DESIGN and the verdicts on them."""

from __future__ import annotations

import pytest

from benchmarks.fsbench.groups import GROUPS
from benchmarks.fsbench.limits import LIMITS, Limit, Verdict, verdict, verdicts
from benchmarks.fsbench.measures import FULL, Measure

from .results import BASE, OURS, measure

RATIO = Limit("work", "a", 2.0)


@pytest.mark.parametrize(
    ("value", "met", "said"),
    [
        (1.0, True, "met"),
        (2.0, True, "met"),
        (2.5, False, "missed by a factor of 1.25"),
        (19.0, False, "missed by a factor of 9.50"),
    ],
)
def test_verdict(value: float, met: bool, said: str) -> None:
    one = Verdict(RATIO, value)
    assert one.met is met
    assert str(one) == said


def found(limit: Limit, *measures: Measure, layers: dict[str, float] | None = None) -> float | None:
    one = verdict(limit, {one.key: one for one in measures}, OURS, BASE, layers or {})
    return one.value if one else None


def test_kinds() -> None:
    assert found(RATIO, measure("a", 1, 3)) == pytest.approx(3)
    assert found(Limit("w", "a", 1, "value"), measure("a", 1, 0.07, unit="ms")) == pytest.approx(140)
    growth = Limit("w", "a", 1.3, "growth", "b")
    assert found(growth, measure("a", 1, 6), measure("b", 1, 4)) == pytest.approx(1.5)
    assert found(Limit("w", "gzip", 1, "layers"), layers={"gzip": 0.22}) == 0.22


def test_nothing_measured_is_no_verdict() -> None:
    assert found(RATIO) is None
    assert found(Limit("w", "a", 1.3, "growth", "b"), measure("a", 1, 6)) is None
    assert found(Limit("w", "gzip", 1, "layers")) is None
    wrong = measure("a", 1, 3)
    wrong.wrong[OURS] = "wrong content"
    assert found(RATIO, wrong) is None
    assert verdicts({"a": wrong}, OURS, BASE, {}) == []


def test_each_figure_has_a_row_of_its_own() -> None:
    assert len({(limit.kind, limit.key) for limit in LIMITS}) == len(LIMITS)


def test_the_sizes_are_those_of_the_figures() -> None:
    assert (FULL.layers, FULL.files, FULL.listed, FULL.small_files) == (10, 12_000, 20_000, 5_000)
    assert (FULL.created, FULL.big, FULL.shape_directories) == (3_000, 512 << 20, 1_200)
    assert {1, 32, 128} <= set(FULL.shape_layers)
    assert 50_000 in FULL.walked


def test_names_of_groups() -> None:
    names = [group.name for group in GROUPS]
    assert len(set(names)) == len(names)
    assert not any("," in name for name in names)
