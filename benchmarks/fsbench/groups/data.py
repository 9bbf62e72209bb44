"""Reads, writes and mappings of large files, by fio: sequential and random."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..caches import drop_all
from ..commands import BenchmarkError
from ..contenders import Contender
from ..measures import Sizes
from ..place import Place
from ..rounds import Bench
from ..stacks import Stack
from .group import Group, lacking

_ALWAYS = ("--thread", "--invalidate=0", "--fallocate=none", "--randrepeat=1", "--output-format=json")
_PATTERN = b"layerfs!"  # what fio writes, over and over


@dataclass(frozen=True)
class Job:
    """One run of fio: `loops` times over `size` bytes of a file, or over some blocks of it at random."""

    key: str
    title: str
    mode: str  # of fio: read, randwrite, ...
    block: int  # bytes
    size: int
    some: int = 0  # bytes, in place of `size`
    loops: int = 1
    engine: str = "psync"
    fsync: bool = False

    @property
    def direction(self) -> str:
        return self.mode.removeprefix("rand")

    @property
    def bytes(self) -> int:
        return (self.some or self.size) * self.loops

    def command(self, path: Path) -> list[str]:
        words = ["fio", f"--name={self.key}", f"--filename={path}", f"--rw={self.mode}", f"--bs={self.block}"]
        words += [f"--size={self.size}", f"--loops={self.loops}", f"--ioengine={self.engine}", *_ALWAYS]
        words += [f"--io_size={self.some}"] if self.some else []
        words += ["--end_fsync=1"] if self.fsync else []
        if self.direction == "read":
            return [*words, "--allow_file_create=0"]
        return [*words, f"--buffer_pattern=0x{_PATTERN.hex()}"]

    def seconds(self, said: str) -> float:
        """From fio's JSON: all blocks together, as its run times are whole milliseconds. Its latencies know
        nothing of the last fsync: with that one it is the run time.

        Raises BenchmarkError when fio did less than it was told."""
        (job,) = json.loads(said[said.index("{") :])["jobs"]  # notes may come first
        done = job[self.direction]
        if job["error"] or done["io_bytes"] != self.bytes:
            raise BenchmarkError(f"fio: {done['io_bytes']} of {self.bytes} bytes, error {job['error']}")
        if self.fsync:
            return max(1, int(done["runtime"])) / 1e3
        return float(done["lat_ns"]["mean"] * done["total_ios"] / 1e9)


class Data(Group):
    """Reads of a lower file, then writes of a new one."""

    name = "data"
    stack = "big"

    def rounds(self, sizes: Sizes) -> int:
        return sizes.slow_rounds

    def prepare(self, scratch: Path, sizes: Sizes) -> None:
        lacking("fio")

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        big, new = stack.others["big"], bench.sizes.written
        large, small = 128 << 10, 4 << 10
        with bench.place(contender, stack, own_disk=True) as place:
            drop_all()
            _time(place, Job("seq_cold", "sequential read, cold", "read", large, big))
            _time(place, Job("seq_warm", "sequential read, warm", "read", large, big, loops=4))
            _time(place, Job("rand_warm", "random 4 KiB reads, warm", "randread", small, big))
            _time(place, Job("mmap_warm", "mmap read, warm", "read", large, big, loops=4, engine="mmap"))
            drop_all()
            _time(place, Job("rand_cold", "random 4 KiB reads, cold", "randread", small, big, some=big // 16))
            drop_all()
            _time(place, Job("mmap_cold", "mmap read, cold", "read", large, big, engine="mmap"))
            _time(place, Job("seq_write", "sequential write", "write", large, new))
            _time(place, Job("rand_write", "random 4 KiB writes", "randwrite", small, new, some=new // 8))
            (place.mnt / "new").unlink(missing_ok=True)
            _time(place, Job("seq_sync", "sequential write and fsync", "write", large, new, fsync=True))


def _time(place: Place, job: Job) -> None:
    path = place.mnt / ("big" if job.direction == "read" else "new")
    title, blocks = f"{job.title}, {job.bytes >> 20:,} MiB", job.bytes // job.block
    place.time(
        job.key, title, blocks, lambda: job.seconds(place.said(*job.command(path))),
        partial(_check_written, path, job.size) if job.direction == "write" else None, unit="ms",
    )  # fmt: skip


def _check_written(path: Path, size: int) -> None:
    block = _PATTERN * (4096 // len(_PATTERN))
    with open(path, "rb") as file:
        while found := file.read(4096):
            if found != block:
                raise BenchmarkError(f"{path.name}: wrong content")
    if path.stat().st_size != size:
        raise BenchmarkError(f"{path.name}: {path.stat().st_size} bytes in place of {size}")
