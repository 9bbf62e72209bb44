"""Puts together what a running mount tells of itself (`layerfs.control.statistics`): from the adapter's
counters, the vfs, the gate and the process."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import layerfs
from layerfs.control.statistics import Requests, Statistics
from layerfs.fdutil import proc_path
from layerfs.fuse.counters import Counters
from layerfs.vfs.vfs import Vfs

#: Opcodes of the gate that come to Python as others.
_SAME = {"rename2": "rename", "batch_forget": "forget"}


class Choice(NamedTuple):
    """How the requests of this mount are answered, each with one line for people that says why."""

    #: way of the bytes of files: "passthrough", "cached" or "python"
    data: str
    data_why: str
    #: whether a native gate is there
    gate: bool
    gate_why: str


class Reporter:
    """Made when the mount is."""

    def __init__(self, choice: Choice) -> None:
        self.counters = Counters()
        self.vfs: Vfs = None  # type: ignore[assignment]  # set before anybody can ask
        self.choice = choice
        self._began = time.monotonic()

    def report(self) -> Statistics:
        """Raises OSError."""
        gate = self.vfs.tree.gate.counters()
        tally = self.vfs.tally
        return {
            "version": layerfs.__version__,
            "uptime": time.monotonic() - self._began,
            "data": {"mode": self.choice.data, "why": self.choice.data_why},
            "gate": {
                "on": self.choice.gate,
                "why": self.choice.gate_why,
                "entries": gate.get("entries", 0),
                "known": gate.get("known", 0),
                "bytes": gate.get("bytes", 0),
            },
            "requests": requests(self.counters.histograms(), gate),
            "copyups": {
                "count": tally.directories + tally.files,
                "directories": tally.directories,
                "metadata_only": tally.metadata_only,
                "reflinked": tally.reflinked,
                "bytes": tally.copied,
            },
            "bytes": {
                "read": tally.read + gate.get("read", 0),
                "written": tally.written + gate.get("written", 0),
            },
            "nodes": len(self.vfs.tree.nodes),
            "memory": _resident(),
            "descriptors": len(os.listdir(proc_path(b"self/fd"))) - 1,  # one is for looking
        }


def requests(python: dict[str, list[int]], gate: dict[str, int]) -> dict[str, Requests]:
    """By kind, in order, from the histograms of Python and the counters of the gate.

    Of requests that are passed on and that Python knows, those that were answered are counted; what the gate
    passes and Python never sees is libfuse's own (INIT, INTERRUPT)."""
    found: dict[str, Requests] = {
        kind: {"native": 0, "python": sum(times), "native_us": [], "python_us": times}
        for kind, times in python.items()
    }
    for key, count in gate.items():
        origin, _, rest = key.partition(".")
        opcode, _, bucket = rest.partition(".")
        if origin not in ("native", "passed", "latency") or not count:
            continue
        kind = _SAME.get(opcode, opcode)
        of_kind = found.setdefault(kind, {"native": 0, "python": 0, "native_us": [], "python_us": []})
        if origin == "native":
            of_kind["native"] += count
        elif origin == "latency":
            _add(of_kind["native_us"], int(bucket), count)
        elif kind not in python:
            of_kind["python"] += count
    return dict(sorted(found.items()))


def _add(histogram: list[int], bucket: int, count: int) -> None:
    histogram.extend([0] * (bucket + 1 - len(histogram)))
    histogram[bucket] += count


def _resident() -> int:
    """Bytes."""
    with open(proc_path(b"self/status"), "rb") as file:
        found = next(line for line in file if line.startswith(b"VmRSS:"))
    return int(found.split()[1]) << 10
