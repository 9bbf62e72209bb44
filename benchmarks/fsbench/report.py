"""Turns measures into a Markdown table of ratios and into JSON. Measures nothing."""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .contenders import Contender
from .rounds import Bench, Measure


def machine(scratch: Path) -> dict[str, object]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":", 1)[1].strip() if names else os.uname().machine
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file_system, longest = "unknown", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        mount_point = line.split()[1]
        if scratch.is_relative_to(mount_point) and len(mount_point) >= longest:
            file_system, longest = line.split()[2], len(mount_point)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_GiB": round(memory / 2**30, 1),
        "kernel": os.uname().release,
        "layers_on": file_system,
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def as_json(bench: Bench, versions: dict[str, str], where: dict[str, object]) -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": where,
        "contenders": versions,
        "sizes": asdict(bench.sizes),
        "measures": [
            {
                "key": measure.key,
                "title": measure.title,
                "operations": measure.operations,
                "unit": measure.unit,
                "median": {name: measure.value(name) for name in versions},
                "seconds": measure.seconds,
                "wrong": measure.wrong,
            }
            for measure in bench.measures.values()
        ],
        "failures": bench.failures,
    }


def as_markdown(
    bench: Bench, contenders: Sequence[Contender], versions: dict[str, str], where: dict[str, object]
) -> str:
    base, *others = [contender.name for contender in contenders]
    lines = [
        f"{datetime.date.today()}: {where['cpu']}, {where['cores']} cores, {where['memory_GiB']} GiB, "
        f"layers on {where['layers_on']}; load at the start {where['load_at_start']}.",
        *(f"* {name}: {version}" for name, version in versions.items()),
        "",
        f"Median wall time of {base}; for the others the ratio to it: median [least to most of the rounds], "
        "and their time.",
        "",
        f"| work | {base} | " + " | ".join(others) + " |",
        "|---|---|" + "---|" * len(others),
    ]
    for measure in bench.measures.values():
        cells = [_time(measure, base), *(_ratio(measure, name, base) for name in others)]
        lines.append(f"| {measure.title} | " + " | ".join(cells) + " |")
    growth = _growth(bench, [base, *others])
    if growth:
        lines += ["", *growth]
    for measure in bench.measures.values():
        lines += [f"* {name}, {measure.title}: WRONG: {why}" for name, why in measure.wrong.items()]
    lines += [f"* FAILED: {failure}" for failure in bench.failures]
    return "\n".join(lines) + "\n"


def _time(measure: Measure, name: str) -> str:
    value = measure.value(name)
    if value is None:
        return "wrong" if name in measure.wrong else "-"
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f} {'µs' if measure.unit == 'us' else 'ms'}"


def _ratio(measure: Measure, name: str, base: str) -> str:
    ratios = measure.ratios(name, base)
    if not ratios:
        return _time(measure, name)
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    return f"**{middle:.2f}** [{least:.2f} to {most:.2f}], {_time(measure, name)}"


def _growth(bench: Bench, names: Sequence[str]) -> list[str]:
    """Cold stat at more layers against one layer, for each contender by itself."""
    counts = [count for count in bench.sizes.shape_layers if count > 1]
    rows = []
    for shape in ("wide", "deep"):
        for which, what in (("present", "stat"), ("absent", "absent names")):
            one = bench.measures.get(f"{shape}_{which}_1")
            if one is None:
                continue
            for name in names:
                cells = []
                for count in counts:
                    many = bench.measures.get(f"{shape}_{which}_{count}")
                    top, bottom = many.value(name) if many else None, one.value(name)
                    cells.append(f"{top / bottom:.2f}" if top and bottom else "-")
                rows.append(f"| {shape}, cold {what} | {name} | " + " | ".join(cells) + " |")
    if not rows:
        return []
    columns = " | ".join(f"{count} layers" for count in counts)
    return [f"| time against the same at 1 layer | | {columns} |", "|---|---|" + "---|" * len(counts), *rows]
