"""What was measured, and how much of everything is done. Measures nothing."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sizes:
    """How much is done; `QUICK` only shows that everything works."""

    rounds: int
    slow_rounds: int  # of what takes long: whole programs, big files, the shapes
    layers: int
    files: int  # in the mixed stack
    listed: int  # names in one directory
    small_files: int  # that are opened and read
    created: int
    untarred: int
    shape_layers: tuple[int, ...]
    shape_directories: int
    big: int  # bytes of the large lower file
    written: int  # bytes written by fio
    walked: tuple[int, ...]  # files of the stacks that are walked for the memory it takes
    worked: int  # files of the git work tree; sources of the build; modules of the wheels


FULL = Sizes(
    5, 3, 10, 12_000, 20_000, 5_000, 3_000, 3_000, (1, 8, 32, 128), 1_200,
    512 << 20, 256 << 20, (50_000, 500_000), 3_000,
)  # fmt: skip
QUICK = Sizes(1, 1, 10, 1_200, 1_000, 500, 300, 400, (1, 32), 60, 16 << 20, 8 << 20, (2_000,), 200)


@dataclass
class Measure:
    """Values of one job by contender and round: seconds, or bytes where the unit is MB."""

    key: str
    title: str
    operations: int
    unit: str  # "us" for each operation; "ms" or "MB" for the whole job
    group: str = ""  # of jobs, to which it belongs
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    requests: dict[str, dict[str, int]] = field(default_factory=dict)  # by contender and kind
    wrong: dict[str, str] = field(default_factory=dict)  # a wrong result counts for all rounds

    def value(self, name: str) -> float | None:
        """Median in the measure's unit."""
        taken = self.values.get(name)
        if not taken or name in self.wrong:
            return None
        scale = {"us": 1e6 / self.operations, "ms": 1e3, "MB": 1e-6}[self.unit]
        return statistics.median(taken.values()) * scale

    def ratios(self, name: str, base: str) -> list[float]:
        """Round by round, against the base contender in the same round."""
        if name in self.wrong or base in self.wrong:
            return []
        ours, theirs = self.values.get(name, {}), self.values.get(base, {})
        return [ours[number] / theirs[number] for number in ours if number in theirs]

    def ratio(self, name: str, base: str) -> float | None:
        ratios = self.ratios(name, base)
        return statistics.median(ratios) if ratios else None

    def requests_each(self, name: str) -> float | None:
        """Requests for each operation; None when nobody counted."""
        kinds = self.requests.get(name)
        return None if kinds is None else sum(kinds.values()) / self.operations


Measures = dict[str, Measure]
