"""What a run gives, as one value; to JSON and back. Measures nothing, and shows nothing."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .limits import verdicts
from .measures import Measure, Measures, Sizes


@dataclass
class Results:
    """`contenders`: versions by name; the first is the one that the others are compared with."""

    date: str
    machine: dict[str, Any]
    contenders: dict[str, str]
    sizes: Sizes
    measures: Measures
    left_out: dict[str, str]  # contenders, and why
    skipped: dict[str, str]  # groups of jobs, and why
    failures: list[str]
    layers: dict[str, float]  # ratios of `layerfs commit` by compression, from benchmarks/layers

    @property
    def base(self) -> str:
        return next(iter(self.contenders))

    @property
    def ours(self) -> list[str]:
        return [name for name in self.contenders if is_ours(name)]

    def wrong(self) -> list[str]:
        """One line for each job that a layerfs did wrong, or could not do."""
        failed = [line for line in self.failures if is_ours(line)]
        for measure in self.measures.values():
            failed += [
                f"{name}, {measure.title}: {why}" for name, why in measure.wrong.items() if is_ours(name)
            ]
        return failed


def is_ours(name: str) -> bool:
    return name.startswith("layerfs")


def today() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_json(results: Results, path: Path) -> None:
    """Medians and verdicts are there for other programs; `read_json` computes them anew."""
    names = list(results.contenders)
    whole = {
        "date": results.date,
        "machine": results.machine,
        "contenders": results.contenders,
        "sizes": asdict(results.sizes),
        "measures": [
            asdict(measure)
            | {
                "median": {name: measure.value(name) for name in names},
                "ratio": {name: measure.ratio(name, results.base) for name in names},
            }
            for measure in results.measures.values()
        ],
        "limits": {
            name: [
                {"work": one.limit.work, "most": one.limit.most, "found": one.value, "met": one.met}
                for one in verdicts(results.measures, name, results.base, results.layers)
            ]
            for name in results.ours
        },
        "left_out": results.left_out,
        "skipped": results.skipped,
        "failures": results.failures,
        "layers": results.layers,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")


def read_json(path: Path) -> Results:
    whole = json.loads(path.read_text())
    sizes: dict[str, Any] = {
        name: tuple(size) if isinstance(size, list) else size for name, size in whole["sizes"].items()
    }
    measures = {}
    for one in whole["measures"]:
        values = {
            name: {int(number): value for number, value in taken.items()}
            for name, taken in one["values"].items()
        }
        fields = {
            name: one[name] for name in ("key", "title", "operations", "unit", "group", "requests", "wrong")
        }
        measures[one["key"]] = Measure(**fields, values=values)
    return Results(
        whole["date"], whole["machine"], whole["contenders"], Sizes(**sizes), measures, whole["left_out"],
        whole["skipped"], whole["failures"], whole["layers"],
    )  # fmt: skip


def layer_ratios(path: Path) -> dict[str, float]:
    """How long `layerfs commit` took against the pipeline, by compression, in a run of benchmarks/layers;
    empty without one."""
    if not path.exists():
        return {}
    ratios = {}
    for measure in json.loads(path.read_text())["measures"]:
        ours, base = measure["runs"].get("layerfs commit"), measure["runs"].get(measure["base"])
        if measure["job"] == "commit" and ours and base:
            pairs = zip(_seconds(ours), _seconds(base), strict=False)
            ratios[measure["compression"]] = statistics.median(a / b for a, b in pairs)
    return ratios


def _seconds(runs: list[Mapping[str, float]]) -> list[float]:
    return [run["seconds"] for run in runs]
