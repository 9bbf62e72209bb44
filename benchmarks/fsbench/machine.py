"""What a run was made on."""

from __future__ import annotations

import os
from pathlib import Path


def machine(scratch: Path) -> dict[str, object]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":", 1)[1].strip() if names else os.uname().machine
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file_system, longest = "unknown", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        mount_point = line.split()[1]
        if scratch.is_relative_to(mount_point) and len(mount_point) >= longest:
            file_system, longest = line.split()[2], len(mount_point)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_GiB": round(memory / 2**30, 1),
        "kernel": os.uname().release,
        "layers_on": file_system,
        "load_at_start": round(os.getloadavg()[0], 2),
    }
