"""Counts the requests that the kernel sends to a FUSE daemon, by kind, for any FUSE file system.

The kernel has a tracepoint for each request, `fuse:fuse_request_send`; an instance of tracefs of our own,
which disturbs no other tracer, lists those of one mount. FORGET is not among them: nobody waits for it. Only
what runs inside `counting` is listed, and costs 0.3 µs more a request (of 17 to 100)."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .commands import BenchmarkError, run

_EVENT = "events/fuse/fuse_request_send"
_BUFFERS = 128 << 10  # KiB for all processors: three million requests
_LINE = re.compile(r" fuse_request_send: connection \d+ req \d+ opcode (\d+) \((\w+)\)")
#: Kinds that older kernels send without having a name for them here.
_NAMES = {53: "COPY_FILE_RANGE_64"}


def connection(st_dev: int) -> int:
    """The kernel's own form of a device number, by which the tracepoint names a mount."""
    return os.major(st_dev) << 20 | os.minor(st_dev)


def counted(lines: Iterable[str]) -> Counter[str]:
    """Requests by kind ("LOOKUP", "READ", ...), from the text of a trace."""
    kinds: Counter[str] = Counter()
    for line in lines:
        if found := _LINE.search(line):
            number, name = int(found[1]), found[2]
            kinds[
                name.removeprefix("FUSE_") if name.startswith("FUSE_") else _NAMES.get(number, f"{number}")
            ] += 1
    return kinds


class RequestCounter:
    """An instance of tracefs; `close` removes it.

    Raises BenchmarkError where there is no tracefs or no such tracepoint, or we may not use it."""

    def __init__(self, scratch: Path) -> None:
        self._tracefs = scratch / "tracefs"
        self._tracefs.mkdir()
        # tracefs is one, wherever it is mounted: a mount of our own depends on nobody's set-up.
        run(["mount", "-t", "tracefs", "tracefs", self._tracefs])
        self._instance = self._tracefs / "instances" / f"layerfs-bench-{os.getpid()}"
        try:
            self._instance.mkdir()
            self._write("buffer_size_kb", max(1024, _BUFFERS // (os.cpu_count() or 1)))
            self._write("tracing_on", 0)
            self._write(f"{_EVENT}/enable", 1)
        except OSError as error:
            self.close()
            raise BenchmarkError(f"no tracepoint for FUSE requests: {error}") from None

    def close(self) -> None:
        if self._instance.is_dir():
            self._instance.rmdir()
        subprocess.run(["umount", str(self._tracefs)], check=False)

    @contextmanager
    def counting(self, st_dev: int) -> Iterator[Counter[str]]:
        """Filled at the end with the requests that were sent for the mount with this device number."""
        kinds: Counter[str] = Counter()
        self._write(f"{_EVENT}/filter", f"connection == {connection(st_dev)}")
        self._write("trace", "")
        self._write("tracing_on", 1)
        try:
            yield kinds
        finally:
            self._write("tracing_on", 0)
            if self._lost():
                raise BenchmarkError("too many requests to be counted")
            with open(self._instance / "trace") as lines:
                kinds.update(counted(lines))
            self._write("trace", "")

    def _lost(self) -> int:
        stats = (self._instance / "per_cpu").glob("cpu*/stats")
        numbers = re.findall(r"(?:overrun|dropped events): (\d+)", "".join(one.read_text() for one in stats))
        return sum(map(int, numbers))

    def _write(self, name: str, value: object) -> None:
        (self._instance / name).write_text(f"{value}\n")
