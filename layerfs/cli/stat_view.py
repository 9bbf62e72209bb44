"""The statistics of a mount for people: as plain lines, or live on a terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from layerfs.control.statistics import Statistics

if TYPE_CHECKING:
    from rich.console import Group

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Fact:
    """One number or text."""

    name: str
    text: str
    #: of `text`'s number, for a rate; None for what has none
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """Requests of one kind by one of the two who answer."""

    kind: str
    by: str
    count: int
    #: times, as `control.statistics.Requests` has them
    times: Sequence[int]


def facts(now: Statistics) -> list[Fact]:
    """Everything but the requests."""
    copyups, gate = now["copyups"], now["gate"]
    why = _printable(gate["why"])
    held = f" ({gate['entries']:,} names, {gate['known']:,} nodes, {gate['bytes']:,} bytes)"
    return [
        Fact("layerfs", f"{_printable(now['version'])}, mounted {now['uptime']:,.0f} s ago"),
        Fact("data path", f"{_printable(now['data']['mode'])}: {_printable(now['data']['why'])}"),
        Fact("gate", f"on: {why}{held}" if gate["on"] else f"off: {why}"),
        Fact(
            "copy-ups",
            f"{copyups['count']:,} (directories {copyups['directories']:,},"
            f" metadata-only {copyups['metadata_only']:,}, reflinked {copyups['reflinked']:,})",
            copyups["count"],
        ),
        Fact("copied up", f"{copyups['bytes']:,} bytes", copyups["bytes"]),
        Fact("read", f"{now['bytes']['read']:,} bytes", now["bytes"]["read"]),
        Fact("written", f"{now['bytes']['written']:,} bytes", now["bytes"]["written"]),
        Fact("nodes", f"{now['nodes']:,}"),
        Fact("memory", f"{now['memory']:,} bytes"),
        Fact("descriptors", f"{now['descriptors']:,}"),
    ]


def answered(now: Statistics) -> list[Answered]:
    """The requests, the most frequent first."""
    found = []
    for kind, each in now["requests"].items():
        found.append(Answered(_printable(kind), "gate", each["native"], each["native_us"]))
        found.append(Answered(_printable(kind), "python", each["python"], each["python_us"]))
    return sorted((each for each in found if each.count), key=lambda each: (-each.count, each.kind, each.by))


def bound(times: Sequence[int], part: float) -> str:
    """The time, a power of two, that `part` of the requests stayed below; "" when there are none."""
    wanted = part * sum(times)
    for bucket, count in enumerate(accumulate(times)):
        if count and count >= wanted:
            return f"<{power(bucket)}"
    return ""


def power(bucket: int) -> str:
    """2**bucket µs in three digits at most; 1024 of one unit are taken for one of the next."""
    thousands = min(bucket // 10, 2)
    return f"{1 << (bucket - 10 * thousands)}{('us', 'ms', 's')[thousands]}"


def lines(now: Statistics) -> list[str]:
    """All of it as plain text: facts, then a table of requests with a column for each time."""
    every = answered(now)
    first, last = _range(every)
    rows = [["request", "by", "count", "median", "99 %", *(f"<{power(k)}" for k in range(first, last))]]
    for each in every:
        times = [f"{each.times[k] or '.'}" if k < len(each.times) else "." for k in range(first, last)]
        row = [each.kind, each.by, f"{each.count:,}", bound(each.times, 0.5), bound(each.times, 0.99)]
        rows.append([*row, *(times if each.times else [])])
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(len(rows[0]))]
    return [
        *(f"{fact.name:<12} {fact.text}" for fact in facts(now)),
        "",
        *("  ".join(_aligned(row, widths)).rstrip() for row in rows),
    ]


def _aligned(row: list[str], widths: list[int]) -> Iterator[str]:
    for k, text in enumerate(row):
        yield text.ljust(widths[k]) if k < 2 else text.rjust(widths[k])


def _range(every: Sequence[Answered]) -> tuple[int, int]:
    """The buckets that anything is in: from the first one to before the last."""
    used = [k for each in every for k, count in enumerate(each.times) if count]
    return (min(used), max(used) + 1) if used else (0, 0)


def _printable(text: str) -> str:
    """Whoever serves the mount may say anything."""
    return text if text.isprintable() else repr(text)


# -- live ------------------------------------------------------------------------------------------


def watch(read: Callable[[], Statistics], interval: float) -> None:
    """Shows what `read` gives, every `interval` seconds, until q or Ctrl-C. Raises what `read` raises."""
    from rich.live import Live

    before, now = None, read()
    with _keys() as wait, Live(screen(now, None), auto_refresh=False) as live:
        with contextlib.suppress(KeyboardInterrupt):
            live.refresh()
            while not wait(interval):
                before, now = now, read()
                live.update(screen(now, before), refresh=True)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Gives `wait(seconds)`, which returns early, with True, when q is pressed."""
    import termios
    import time
    import tty

    def sleep(seconds: float) -> bool:
        time.sleep(seconds)
        return False

    def wait(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([fd], [], [], left)[0] and os.read(fd, 1) in (b"q", b"Q", b""):
                return True
        return False

    if sys.stdin is None or not sys.stdin.isatty():
        yield sleep
        return
    fd = sys.stdin.fileno()
    saved = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield wait
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)


def screen(now: Statistics, before: Statistics | None) -> Group:
    """All of it for rich, with rates since `before`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    seconds = now["uptime"] - before["uptime"] if before is not None else 0.0

    def rate(number: int, then: int | None) -> str:
        return f"{(number - (then or 0)) / seconds:,.0f}/s" if seconds > 0 else ""

    told = Table.grid(padding=(0, 2))
    told.add_column(style="bold", no_wrap=True)
    earlier = {fact.name: fact.number for fact in facts(before)} if before is not None else {}
    for fact in facts(now):
        pace = rate(fact.number, earlier.get(fact.name)) if fact.number is not None else ""
        told.add_row(fact.name, Text(fact.text), Text(pace, justify="right"))

    every = answered(now)
    first, last = _range(every)
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("request", "by"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("count", "rate", "median", "99 %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column(f"<{power(first)} to <{power(last - 1)}" if first < last else "", no_wrap=True)
    counts = {(e.kind, e.by): e.count for e in answered(before)} if before is not None else {}
    for each in every:
        shown.add_row(
            Text(each.kind),
            each.by,
            f"{each.count:,}",
            rate(each.count, counts.get((each.kind, each.by))),
            bound(each.times, 0.5),
            bound(each.times, 0.99),
            bars(each.times, first, last),
        )
    return Group(told, Text(), shown, Text("q ends", style="dim"))


def bars(times: Sequence[int], first: int, last: int) -> str:
    """A bar for each bucket from `first` to before `last`: its height against the highest, a blank for
    none."""
    highest = max(times, default=0)
    heights = [times[k] if k < len(times) else 0 for k in range(first, last)]
    return "".join(_BARS[(count * len(_BARS) - 1) // highest] if count else " " for count in heights)
