"""Reads, writes and mappings of large files, by fio: sequential and random."""

from __future__ import annotations

import json
from collections.abc import Callable
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


class Data(Group):
    """Reads of a lower file, then writes of new ones. Warm reads go over the file several times."""

    name = "data"
    stack = "big"

    def rounds(self, sizes: Sizes) -> int:
        return sizes.slow_rounds

    def prepare(self, scratch: Path, sizes: Sizes) -> None:
        lacking("fio")

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        size, written = stack.others["big"], bench.sizes.written
        some = size // 16  # of a file, for what goes to the disk block by block
        with bench.place(contender, stack, own_disk=True) as place:
            read = partial(_time, place, "big", "read")
            drop_all()
            read("seq_cold", "sequential read, cold", size, "--bs=128k")
            read("seq_warm", "sequential read, warm", size, "--bs=128k", "--loops=4")
            read("rand_warm", "random 4 KiB reads, warm", size, "--bs=4k", rw="randread")
            drop_all()
            read("rand_cold", "random 4 KiB reads, cold", size, "--bs=4k", f"--io_size={some}", rw="randread")
            drop_all()
            read("mmap_cold", "mmap read, cold", size, "--bs=128k", "--ioengine=mmap")
            read("mmap_warm", "mmap read, warm", size, "--bs=128k", "--ioengine=mmap", "--loops=4")

            write = partial(_time, place, "written", "write")
            whole = partial(_check_written, place.mnt / "written", written)
            write("seq_write", "sequential write", written, "--bs=128k", check=whole)
            write(
                "rand_write",
                "random 4 KiB writes",
                written,
                "--bs=4k",
                f"--io_size={some}",
                rw="randwrite",
                check=whole,
            )
            (place.mnt / "written").unlink(missing_ok=True)
            write(
                "seq_sync", "sequential write and fsync", written, "--bs=128k", "--end_fsync=1", check=whole
            )


def _time(
    place: Place,
    name: str,
    direction: str,
    key: str,
    title: str,
    size: int,
    *options: str,
    rw: str = "",
    check: Callable[[], None] | None = None,
) -> None:
    """One run of fio. An operation is a block as fio counts them."""
    words = [
        "fio",
        f"--name={key}",
        f"--filename={place.mnt / name}",
        f"--size={size}",
        f"--rw={rw or direction}",
    ]
    if direction == "write":
        words += [f"--buffer_pattern=0x{_PATTERN.hex()}", "--create_on_open=1", "--file_append=0"]
    else:
        words += ["--allow_file_create=0"]
    given = dict(option.removeprefix("--").split("=") for option in options)
    block = 1024 * int(given["bs"].removesuffix("k"))
    blocks = int(given.get("io_size", size)) // block * int(given.get("loops", 1))

    def take() -> float:
        said = place.said(*words, *options, *_ALWAYS)
        (job,) = json.loads(said[said.index("{") :])["jobs"]  # notes may come first
        if job["error"] or job[direction]["io_bytes"] != blocks * block:
            raise BenchmarkError(f"fio: {job[direction]['io_bytes']} bytes, error {job['error']}")
        if "end_fsync" in given:
            return max(1, int(job[direction]["runtime"])) / 1e3
        # All blocks together: fio's run times are whole milliseconds.
        return float(job[direction]["lat_ns"]["mean"] * job[direction]["total_ios"] / 1e9)

    place.time(key, f"{title}, {blocks * block >> 20:,} MiB", blocks, take, check, unit="ms")


def _check_written(path: Path, size: int) -> None:
    block = _PATTERN * (4096 // len(_PATTERN))
    with open(path, "rb") as file:
        while found := file.read(4096):
            if found != block:
                raise BenchmarkError("written: wrong content")
    if path.stat().st_size != size:
        raise BenchmarkError(f"written: {path.stat().st_size} bytes in place of {size}")
