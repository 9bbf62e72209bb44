"""Results as a run gives them, made by hand."""

from __future__ import annotations

from benchmarks.fsbench.measures import QUICK, Measure
from benchmarks.fsbench.results import Results

BASE, OTHER, OURS = "kernel overlayfs", "fuse-overlayfs", "layerfs"


def measure(key: str, base: float, ours: float, *, operations: int = 100, unit: str = "us") -> Measure:
    """Three rounds: seconds that grow from round to round for both alike."""
    values = {
        name: {number: seconds * (number + 1) for number in range(3)}
        for name, seconds in ((BASE, base), (OURS, ours))
    }
    return Measure(key, f"the work {key}", operations, unit, "group", values)


def results(*measures: Measure) -> Results:
    return Results(
        date="2026-01-02T03:04:05+00:00",
        machine={
            "cpu": "a processor",
            "cores": 2,
            "memory_GiB": 4.0,
            "kernel": "6.1.0",
            "layers_on": "ext4",
            "load_at_start": 0.1,
        },
        contenders={BASE: "Linux 6.1.0", OTHER: "1.10", OURS: "layerfs 0.1.0"},
        sizes=QUICK,
        measures={one.key: one for one in measures},
        left_out={"mergerfs": "not installed"},
        skipped={"data": "fio is not installed"},
        failures=[],
        layers={"gzip": 0.22},
    )
