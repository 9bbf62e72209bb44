"""Draws results as SVG: ratios by job, and time against the number of layers. Measures nothing.

The only part of the benchmarks that needs more than the standard library (matplotlib, the `bench` extra)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .measures import Measure
from .results import Results, is_ours

matplotlib.use("svg")
# Text stays text, and the same results give the same bytes.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "layerfs", "font.size": 9})

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

#: What the chart of ratios shows, from top to bottom.
_JOBS = {
    "cold_present": "cold stat",
    "cold_absent": "cold absent names",
    "warm_present": "warm stat",
    "cold_find": "cold find -ls",
    "warm_find": "warm find -ls",
    "cold_ls": "cold ls -lU, one big directory",
    "cold_read": "small files, cold",
    "warm_read": "small files, warm",
    "cold_xattr": "xattr walk",
    "seq_cold": "sequential read, cold",
    "seq_write": "sequential write",
    "mmap_cold": "mmap read, cold",
    "create": "create small files",
    "remove": "remove them",
    "untar": "untar",
    "chown": "chown -R of lower files",
    "append": "append to a big lower file",
    "rm": "rm -r of a lower tree",
    "cold_python": "python -c 'import …', cold",
    "cold_git": "git status, cold",
    "make": "make -j2",
    "pip": "pip install",
    "apt": "apt-get install",
}
_OURS = ("#14532d", "#2f9e5b", "#7cc79a", "#b5d99c")
_OTHERS = ("#222222", "#8a8a8a", "#1f5aa6", "#d98032", "#9c6bb0", "#c0504d")


def draw(results: Results, directory: Path) -> list[Path]:
    """Writes ratios.svg and layers.svg, those of them for which there are measures."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in (("ratios", _ratios(results)), ("layers", _layers(results))):
        if figure is not None:
            path = directory / f"{name}.svg"
            figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            drawn.append(path)
    return drawn


def _style(results: Results) -> dict[str, str]:
    """A colour for each contender, ours first."""
    others = [name for name in results.contenders if not is_ours(name)]
    return dict(zip([*results.ours, *others], [*_OURS[: len(results.ours)], *_OTHERS], strict=False))


def _ratios(results: Results) -> Figure | None:
    there = {key: said for key, said in _JOBS.items() if key in results.measures}
    colours = _style(results)
    names = [name for name in colours if name != results.base]
    if not there or not names:
        return None
    step = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(8, 0.4 + len(there) * (0.16 + 0.07 * len(names))))
    for number, name in enumerate(names):
        found = [(at, results.measures[key].ratio(name, results.base)) for at, key in enumerate(there)]
        bars = [(at + number * step - 0.4, ratio) for at, ratio in found if ratio is not None]
        axes.barh(
            [at for at, _ in bars],
            [ratio - 1 for _, ratio in bars],
            height=step,
            left=1,
            color=colours[name],
            label=name,
            align="edge",
        )
    axes.set_yticks(range(len(there)), list(there.values()))
    axes.set_ylim(len(there) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"wall time, as a ratio to {results.base} (left of 1 is faster)")
    axes.grid(alpha=0.3)
    _finish(figure, axes, results)
    return figure


def _layers(results: Results) -> Figure | None:
    """Cold stat and absent names in the deep and the wide shape, microseconds over layers."""
    panels = [(shape, which) for shape in ("deep", "wide") for which in ("present", "absent")]
    counts = results.sizes.shape_layers
    if not any(f"{shape}_{which}_{counts[0]}" in results.measures for shape, which in panels):
        return None
    colours = _style(results)
    figure, grid = pyplot.subplots(2, 2, figsize=(9, 6.5), sharex=True, sharey=True)
    for axes, (shape, which) in zip(grid.flat, panels, strict=True):
        for name in colours:
            found = [_value(results.measures.get(f"{shape}_{which}_{count}"), name) for count in counts]
            points = [(count, value) for count, value in zip(counts, found, strict=True) if value]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colours[name], label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_title(f"{shape}: {'cold stat' if which == 'present' else 'absent names'}")
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("layers")
    for axes in grid[:, 0]:
        axes.set_ylabel("µs a name")
    _finish(figure, grid.flat[0], results)
    return figure


def _value(measure: Measure | None, name: str) -> float | None:
    return measure.value(name) if measure else None


def _finish(figure: Figure, axes: Axes, results: Results) -> None:
    """One legend for all panels, and what it was measured on."""
    where = results.machine
    said = f"{where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, {results.date[:10]}"
    figure.legend(
        *axes.get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8,
        frameon=False, title=said, title_fontsize=8,
    )  # fmt: skip
    figure.tight_layout()
