"""Turns measures into Markdown tables and into JSON. Measures nothing."""

from __future__ import annotations

import datetime
import statistics
from dataclasses import asdict

from .rounds import Bench, Measure


def as_json(bench: Bench, versions: dict[str, str], where: dict[str, object]) -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": where,
        "programs": versions,
        "sizes": asdict(bench.sizes),
        "tree": {"files": bench.tree_files, "bytes": bench.tree_bytes},
        "measures": [
            {
                "job": measure.job,
                "compression": measure.compression,
                "base": measure.base,
                "runs": {name: [asdict(one) for one in runs] for name, runs in measure.runs.items()},
                "layer_bytes": measure.sizes,
                "wrong": measure.wrong,
                "absent": measure.absent,
            }
            for measure in bench.measures
        ],
        "one_changed_file": asdict(bench.small) if bench.small else None,
    }


def as_markdown(bench: Bench, versions: dict[str, str], where: dict[str, object]) -> str:
    lines = [
        f"{datetime.date.today()}: {where['cpu']}, {where['cores']} cores, {where['memory_GiB']} GiB, "
        f"files on {where['layers_on']}; load at the start {where['load_at_start']}. "
        f"{bench.tree_files:,} files of {bench.tree_bytes / 2**20:,.0f} MiB, {bench.sizes.rounds} rounds.",
        *(f"* {name}: {version}" for name, version in versions.items()),
        "",
        "Ratio of wall times to the first program of the group: median [least to most of the rounds]. Wall "
        "and processor time: medians. Memory: of the largest process.",
    ]
    for job in ("commit", "apply"):
        lines += [
            "",
            f"| {job} | | ratio | wall | processor | memory |" + (" layer |" if job == "commit" else ""),
            "|---|---|---|---|---|---|" + ("---|" if job == "commit" else ""),
        ]
        for measure in bench.measures:
            if measure.job == job:
                lines += [_row(measure, tool.name) for tool in measure.tools]
    if bench.small is not None:
        small = bench.small
        calls = f", {small.calls:,} system calls" if small.calls is not None else ""
        lines += [
            "",
            f"Commit of one changed file over {small.base_files:,} files: {small.seconds * 1e3:.0f} ms"
            f"{calls} (`layerfs --version`: {small.start_up * 1e3:.0f} ms).",
        ]
    return "\n".join(lines) + "\n"


def _row(measure: Measure, name: str) -> str:
    shown = name.replace("|", "\\|")
    if why := measure.wrong.get(name):
        return f"| {measure.compression} | {shown} | WRONG: {why} |"
    if why := measure.absent.get(name):
        return f"| {measure.compression} | {shown} | {why} |"
    ratios = measure.ratios(name)
    ratio = "1" if name == measure.base else "-"
    if ratios and name != measure.base:
        ratio = f"**{statistics.median(ratios):.2f}** [{min(ratios):.2f} to {max(ratios):.2f}]"
    seconds, processor = measure.median(name), measure.median(name, "processor")
    memory = measure.median(name, "memory")
    assert seconds is not None and processor is not None and memory is not None
    cells = [
        measure.compression,
        shown,
        ratio,
        f"{seconds:.2f} s",
        f"{processor:.2f} s",
        f"{memory / 1024:.0f} MiB",
    ]
    if measure.job == "commit":
        cells.append(f"{measure.sizes[name] / 2**20:.0f} MiB")
    return "| " + " | ".join(cells) + " |"
