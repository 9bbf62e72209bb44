"""One row a run in HISTORY.md: date, machine, versions, the ratios that tell most."""

from __future__ import annotations

from pathlib import Path

from .limits import verdicts
from .results import Results

#: column: measure. Ratios to kernel overlayfs, but for the last two.
_COLUMNS = {
    "cold stat": "cold_present",
    "absent": "cold_absent",
    "deep 128": "deep_present_128",
    "cold find": "cold_find",
    "read cold": "cold_read",
    "read warm": "warm_read",
    "seq. read": "seq_cold",
    "create": "create",
    "untar": "untar",
    "chown": "chown",
    "append": "append",
    "make": "make",
    "start, ms": "start",
    "50,000 files, MB": "memory_50000",
}
_HEAD = """\
# Runs of `benchmarks/run`

Appended by `benchmarks/run --history`, one row for each layerfs of a run, the newest last. Ratios of wall
time to kernel overlayfs in the same run unless a unit is named. *met*: how many of the figures in DESIGN's
table were reached, of those that were measured.

"""


def rows(results: Results) -> list[str]:
    where = results.machine
    on = f"{where['cpu']}, {where['cores']} cores, {where['kernel']}"
    others = next(
        (f"{name} {said}" for name, said in results.contenders.items() if name == "fuse-overlayfs"), "-"
    )
    lines = []
    for name in results.ours:
        cells = []
        for title, key in _COLUMNS.items():
            measure = results.measures.get(key)
            absolute = title.endswith(("ms", "MB"))
            value = measure and (measure.value(name) if absolute else measure.ratio(name, results.base))
            cells.append("-" if value is None else f"{value:.0f}" if absolute else f"{value:.2f}")
        judged = verdicts(results.measures, name, results.base, results.layers)
        met = f"{sum(one.met for one in judged)} of {len(judged)}"
        said = results.contenders[name]
        lines.append("| " + " | ".join([results.date[:10], on, said, others, *cells, met]) + " |")
    return lines


def append(results: Results, path: Path) -> None:
    """Makes the file, with its head, when there is none."""
    if not path.exists():
        path.write_text(head())
    with open(path, "a") as file:
        file.write("".join(f"{row}\n" for row in rows(results)))


def head() -> str:
    columns = ["date", "machine", "layerfs", "beside", *_COLUMNS, "met"]
    return f"{_HEAD}| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
