"""Charts are SVG, name everything that was measured, and depend on the results alone."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from .results import BASE, OTHER, OURS, measure, results

pytest.importorskip("matplotlib", reason="no matplotlib (scripts/setup bench)")

from benchmarks.fsbench.charts import draw


def texts(path: Path) -> set[str]:
    return {one.text or "" for one in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}


def test_charts(tmp_path: Path) -> None:
    shapes = [
        measure(f"{shape}_{which}_{layers}", 0.001, 0.004)
        for shape in ("wide", "deep")
        for which in ("present", "absent")
        for layers in (1, 32)
    ]
    found = results(measure("cold_present", 1, 19), measure("chown", 1, 0.5), *shapes)
    ratios, layers = draw(found, tmp_path / "a")
    assert {"cold stat", "chown -R of lower files", OURS, OTHER} <= texts(ratios)
    assert "untar" not in texts(ratios)  # it was not measured
    assert {"deep: cold stat", "wide: absent names", BASE, OURS} <= texts(layers)
    again = draw(found, tmp_path / "b")
    assert [path.read_bytes() for path in again] == [ratios.read_bytes(), layers.read_bytes()]


def test_nothing_measured_nothing_drawn(tmp_path: Path) -> None:
    assert draw(results(), tmp_path) == []
