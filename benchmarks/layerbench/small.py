"""One changed file over a large image: what a commit of it costs must depend on the upper alone. Compares
with nobody."""

from __future__ import annotations

import re
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from fsbench.commands import run

_PER_DIRECTORY = 100


@dataclass
class SmallCommit:
    """`calls`: system calls of the whole command, where strace can count them."""

    base_files: int
    seconds: float
    start_up: float
    calls: int | None


def measure(command: str, base_files: int, place: Path) -> SmallCommit:
    lower, upper = place / "lower", place / "upper"
    for number in range(base_files // _PER_DIRECTORY):
        directory = lower / f"directory-{number:05}"
        directory.mkdir(parents=True)
        for file in range(_PER_DIRECTORY):
            (directory / f"file-{file:03}").touch()
    changed = upper / "directory-00000" / "file-000"
    changed.parent.mkdir(parents=True)
    changed.write_text("changed\n")
    commit: list[str | Path]
    commit = [command, "commit", "--upper", upper, "--lower", lower, "-o", place / "layer.tar"]
    seconds = statistics.median(_seconds(commit) for _ in range(5))
    start_up = statistics.median(_seconds([command, "--version"]) for _ in range(5))
    calls = None
    if shutil.which("strace"):
        counts = place / "counts"
        run(["strace", "-f", "-c", "-o", counts, *commit])
        total = re.search(r"^100\.00 +\S+ +\S+ +(\d+) .*total$", counts.read_text(), re.MULTILINE)
        calls = int(total[1]) if total else None
    return SmallCommit(base_files, seconds, start_up, calls)


def _seconds(command: list[str | Path]) -> float:
    begin = time.perf_counter()
    run(command)
    return time.perf_counter() - begin
