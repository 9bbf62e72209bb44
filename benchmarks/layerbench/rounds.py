"""Runs the programs: each once in every round, in turning order, so that what else the machine does falls on
all alike. Checks what each made before its times count. Prints only progress, to stderr."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fsbench.commands import BenchmarkError, run

from . import small, trees
from .tools import Tool, packers, unpackers

JOB_TIMEOUT = 900  # seconds
_MAGIC = {b"\x1f\x8b": "pigz -dc", b"\x28\xb5": "zstd -q -dc"}


@dataclass(frozen=True)
class Sizes:
    rounds: int
    files: int
    bytes: int
    #: files in the layers below one changed file
    base_files: int


@dataclass
class Run:
    """What one run took: wall and processor time in seconds, the largest process in KiB."""

    seconds: float
    processor: float
    memory: int


@dataclass
class Measure:
    """The programs that do one job with one compression; the first one is the base of the ratios."""

    job: str
    compression: str
    tools: Sequence[Tool]
    runs: dict[str, list[Run]] = field(default_factory=dict)
    #: bytes of the layers made
    sizes: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return self.tools[0].name

    def median(self, name: str, what: str = "seconds") -> float | None:
        runs = self.runs.get(name)
        return statistics.median(getattr(one, what) for one in runs) if runs else None

    def ratios(self, name: str) -> list[float]:
        """Round by round, against the base in the same round."""
        pairs = zip(self.runs.get(name, []), self.runs.get(self.base, []), strict=False)
        return [one.seconds / base.seconds for one, base in pairs]


class Bench:
    def __init__(self, command: str, sizes: Sizes, scratch: Path, without: Sequence[str]) -> None:
        self.sizes = sizes
        self.measures: list[Measure] = []
        self.small: small.SmallCommit | None = None
        self.tree_bytes = self.tree_files = 0
        self._command = command
        self._without = without
        self._scratch = scratch
        self._tree = scratch / "tree"

    def run(self) -> None:
        _say(f"making {self.sizes.files} files of {self.sizes.bytes >> 20} MiB")
        # In a process of its own: what runs later is said to take at least the memory of who started it.
        making = multiprocessing.Process(
            target=trees.make, args=(self._tree, self.sizes.files, self.sizes.bytes)
        )
        making.start()
        making.join()
        sizes = [entry.lstat().st_size for entry in self._tree.rglob("*") if entry.is_file()]
        self.tree_bytes, self.tree_files = sum(sizes), len(sizes)
        self._job("commit", packers(self._command, self._tree))
        layers = {}
        for compression, pipeline in {"none": "cat", "gzip": "pigz", "zstd": "zstd -q -T0"}.items():
            layers[compression] = self._scratch / f"layer.{compression}"
            script = f'tar --format=posix --numeric-owner --xattrs -C "$0" -c . | {pipeline} > "$1"'
            bash = ["bash", "-o", "pipefail", "-c", script]
            run([*bash, self._tree, layers[compression]], timeout=JOB_TIMEOUT)
        self._job("apply", unpackers(self._command, layers))
        _say(f"one changed file over {self.sizes.base_files}")
        self.small = small.measure(self._command, self.sizes.base_files, self._scratch / "small")

    def _job(self, job: str, by_compression: dict[str, Sequence[Tool]]) -> None:
        measures = []
        for compression, tools in by_compression.items():
            measure = Measure(job, compression, tools)
            for tool in tools:
                if tool.name in self._without:
                    measure.absent[tool.name] = "left out"
                elif why := tool.missing():
                    measure.absent[tool.name] = why
            measures.append(measure)
        self.measures += measures
        pairs = [(measure, tool) for measure in measures for tool in measure.tools]
        pairs = [(measure, tool) for measure, tool in pairs if tool.name not in measure.absent]
        prepared: list[Tool] = []
        try:
            for measure, tool in pairs:
                prepared.append(tool)
                self._try(measure, tool, lambda tool=tool: tool.prepare(_empty(self._scratch)))
            for number in range(self.sizes.rounds + 1):
                # Round 0 warms caches, and is checked.
                _say(f"{job}: round {number} of {self.sizes.rounds}")
                turn = number % len(pairs)
                for measure, tool in pairs[turn:] + pairs[:turn]:
                    if tool.name not in measure.wrong:
                        self._try(measure, tool, lambda m=measure, t=tool, n=number: self._once(m, t, n))
        finally:
            for tool in prepared:
                tool.end()

    @staticmethod
    def _try(measure: Measure, tool: Tool, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except (BenchmarkError, OSError, KeyError, IndexError) as error:
            measure.wrong[tool.name] = str(error)
            _say(f"{tool.name}: {error}")

    def _once(self, measure: Measure, tool: Tool, number: int) -> None:
        place = _empty(self._scratch)
        out = place / "out"
        out.mkdir()
        os.sync()
        taken = _timed(tool.shell(out))
        if number:
            measure.runs.setdefault(tool.name, []).append(taken)
        else:
            result = tool.result(out)
            if measure.job == "commit":
                measure.sizes[tool.name] = result.stat().st_size
            self._check(tool, result, place)
        shutil.rmtree(place)

    def _check(self, tool: Tool, result: Path, place: Path) -> None:
        if result.is_file():
            layer, result = result, place / "unpacked"
            result.mkdir()
            with open(layer, "rb") as file:
                decompressor = _MAGIC.get(file.read(2), "cat")
            script = f'{decompressor} < "$0" | tar --numeric-owner --xattrs -x -C "$1"'
            run(["bash", "-o", "pipefail", "-c", script, layer, result], timeout=JOB_TIMEOUT)
        differs = trees.difference(self._tree, result, seconds=tool.seconds)
        if differs is not None:
            raise BenchmarkError(f"differs from the tree: {differs}")


def _timed(shell: str) -> Run:
    with tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", shell], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise BenchmarkError(f"exit status {process.returncode}: {lines[-1]}")
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss)


def _empty(scratch: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=scratch))


def _say(text: str) -> None:
    print(f"benchmarks/layers: {text}", file=sys.stderr)
