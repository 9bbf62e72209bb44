"""Turns results into Markdown: ratios, requests, verdicts. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from .limits import LIMITS, verdict
from .measures import Measure
from .results import Results

_MOST_KINDS = 4  # of requests that are named


def as_markdown(results: Results, *, judged: bool = True) -> str:
    """`judged`: with verdicts, which the small sizes of the short form cannot give."""
    parts = [_head(results), _times(results), _requests(results), _growth(results)]
    if judged:
        parts.append(_verdicts(results))
    parts.append(_remarks(results))
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _head(results: Results) -> list[str]:
    where = results.machine
    return [
        f"{results.date[:10]}: {where['cpu']}, {where['cores']} cores, {where['memory_GiB']} GiB, "
        f"layers on {where['layers_on']}; load at the start {where['load_at_start']}.",
        *(f"* {name}: {version}" for name, version in results.contenders.items()),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return lines + ["| " + " | ".join(row) + " |" for row in escaped] if rows else []


def _times(results: Results) -> list[str]:
    base, *others = results.contenders
    asked = results.ours[:1]  # whose requests stand beside the times
    rows = [
        [
            measure.title,
            _time(measure, base),
            *(_ratio(measure, name, base) for name in others),
            *(_each(measure, name) for name in asked),
        ]
        for measure in results.measures.values()
    ]
    return [
        f"Median of {base}; for the others the ratio to it: median [least to most of the rounds], and their "
        "median. Requests are those that the kernel sends to the daemon, for each operation.",
        "",
        *_table(["work", base, *others, *(f"requests, {name}" for name in asked)], rows),
    ]


def _time(measure: Measure, name: str) -> str:
    value = measure.value(name)
    if value is None:
        return "wrong" if name in measure.wrong else "-"
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f} {'µs' if measure.unit == 'us' else measure.unit}"


def _ratio(measure: Measure, name: str, base: str) -> str:
    ratios = measure.ratios(name, base)
    if not ratios:
        return _time(measure, name)
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    spread = f" [{least:.2f} to {most:.2f}]" if len(ratios) > 1 else ""
    return f"**{middle:.2f}**{spread}, {_time(measure, name)}"


def _each(measure: Measure, name: str) -> str:
    each = measure.requests_each(name)
    return "-" if each is None else _number(each)


def _number(each: float) -> str:
    return f"{each:,.0f}" if each >= 100 else f"{each:.2f}" if each else "0"


def _requests(results: Results) -> list[str]:
    names = [
        name for name in results.contenders if any(name in one.requests for one in results.measures.values())
    ]
    rows = []
    for measure in results.measures.values():
        cells = [_kinds(measure.requests.get(name), measure.operations) for name in names]
        if any(cell != "-" for cell in cells):
            rows.append([measure.title, f"{measure.operations:,}", *cells])
    title = "Requests for each operation, by kind; FORGET, which nobody waits for, is not counted."
    return [title, "", *_table(["work", "operations", *names], rows)] if rows else []


def _kinds(kinds: Mapping[str, int] | None, operations: int) -> str:
    """`2.05: LOOKUP 1.00, OPEN 0.35, ...`; what is less than a hundredth stays out."""
    if kinds is None:
        return "-"
    named = [
        f"{kind} {_number(count / operations)}" for kind, count in kinds.items() if count >= operations / 100
    ]
    if len(named) > _MOST_KINDS:
        named[_MOST_KINDS:] = ["…"]
    return f"**{_number(sum(kinds.values()) / operations)}**" + (f": {', '.join(named)}" if named else "")


def _growth(results: Results) -> list[str]:
    """Cold stat at more layers against one layer, for each contender by itself."""
    counts = [count for count in results.sizes.shape_layers if count > 1]
    rows = []
    for shape in ("wide", "deep"):
        for which, what in (("present", "stat"), ("absent", "absent names")):
            one = results.measures.get(f"{shape}_{which}_1")
            if one is None:
                continue
            for name in results.contenders:
                cells = []
                for count in counts:
                    many = results.measures.get(f"{shape}_{which}_{count}")
                    top, bottom = many.value(name) if many else None, one.value(name)
                    cells.append(f"{top / bottom:.2f}" if top and bottom else "-")
                rows.append([f"{shape}, cold {what}", name, *cells])
    return _table(["time against the same at 1 layer", "", *(f"{count} layers" for count in counts)], rows)


def _verdicts(results: Results) -> list[str]:
    """Every figure of DESIGN, whether it was measured or not."""
    rows = []
    for limit in LIMITS:
        cells = []
        for name in results.ours:
            one = verdict(limit, results.measures, name, results.base, results.layers)
            cells.append(f"{one.value:.2f}: {one}" if one else "not measured")
        rows.append([limit.work, f"{limit.most:g}", *cells])
    title = "Numbers to reach (DESIGN, section 9): ratios to kernel overlayfs unless a unit is named."
    return [title, "", *_table(["work", "at most", *results.ours], rows)]


def _remarks(results: Results) -> list[str]:
    lines = [f"* Left out: {name}: {why}" for name, why in results.left_out.items()]
    lines += [f"* Skipped: {name}: {why}" for name, why in results.skipped.items()]
    for measure in results.measures.values():
        lines += [f"* {name}, {measure.title}: WRONG: {why}" for name, why in measure.wrong.items()]
    return lines + [f"* FAILED: {failure}" for failure in results.failures]
