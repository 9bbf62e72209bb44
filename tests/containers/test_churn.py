"""Containers come and go, and nothing stays: no process, mount, file or descriptor; and the memory of a mount
that lives through all of it stays flat.

LAYERFS_CHURN=N: so many cycles instead of 25 (at least 10). LAYERFS_CHURN_REPORT=FILE: what was measured,
in one line (`scripts/soak churn`)."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from tests.containers.store import Store
from tests.support import mounts
from tests.support.processes import eventually

CYCLES = max(10, int(os.environ.get("LAYERFS_CHURN", "25")))
#: The long-lived mount is measured from here on: what is loaded once is loaded by then.
WARM = 8
#: Growth of the long-lived daemon that is taken for the allocator's, in KiB.
SLACK = 2048

pytestmark = [pytest.mark.root, pytest.mark.long, pytest.mark.timeout(300 + 30 * CYCLES)]

WORK = """
cd /srv; mkdir d; i=0; while [ $i -lt 60 ]; do echo $i >d/$i; i=$((i + 1)); done
mv d e; echo more >>second; chmod 600 big; cat e/* | wc -l; rm -r e
"""


def memory(pid: int) -> int:
    """Memory of its own in KiB."""
    found = re.search(r"^RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def files(store: Store) -> set[str]:
    """What lies in the store, apart from logs, and apart from what is in mounts."""
    found = set()
    for top in (store.dir, store.run_dir):
        for where, directories, names in os.walk(top):
            directories[:] = [
                name
                for name in directories
                if name not in ("log", "merged") and not os.path.ismount(f"{where}/{name}")
            ]
            found |= {f"{where}/{name}" for name in (*directories, *names)}
    return found


def cycle(store: Store, number: int) -> None:
    name = f"c{number}"
    if number % 2:
        store.podman("run", "-d", "--name", name, "base", "sleep", "1000")
        assert store.podman("exec", name, "sh", "-c", WORK) == "60\n"
        store.podman("rm", "-f", "-t", "0", name)
    else:
        store.podman("create", "--name", name, "base", "sh", "-c", f"{WORK} sleep 1000")
        store.podman("start", name)
        store.podman("stop", "-t", "0", name)
        store.podman("rm", name)


def test_nothing_stays(store: Store) -> None:
    began = time.monotonic()
    store.podman("run", "-d", "--name", "stays", "base", "sleep", "1000000")
    (daemon,) = store.daemons()
    steady = store.processes()  # it, conmon, and the container

    def settled() -> tuple[set[str], int, int]:
        """Files, mounts, and descriptors of the one daemon, once the last cycle has ended."""
        assert eventually(lambda: store.processes() == steady), [*map(mounts._describe, store.processes())]
        mounted = len(Path("/proc/self/mountinfo").read_text().splitlines())
        return files(store), mounted, len(os.listdir(f"/proc/{daemon}/fd"))

    measured: list[int] = []
    before = settled()
    for number in range(CYCLES):
        cycle(store, number)
        assert store.podman("exec", "stays", "sh", "-c", WORK) == "60\n"
        if number == WARM:
            before = settled()
        if number >= WARM:
            measured.append(memory(daemon))
    after = settled()
    assert before[0] ^ after[0] == set()
    assert before[1:] == after[1:]
    # The mean of the ends, not single values: what was not collected yet is no leak.
    few = max(1, len(measured) // 4)
    first, last = sum(measured[:few]) // few, sum(measured[-few:]) // few
    assert last <= first + SLACK, measured
    store.podman("rm", "-a", "-f", "-t", "0")
    store.assert_idle()
    if report := os.environ.get("LAYERFS_CHURN_REPORT"):
        pace = (time.monotonic() - began) / CYCLES
        Path(report).write_text(
            f"{CYCLES} containers came and went, {pace:.1f} s each; memory of a mount that lived through it"
            f" {first / 1024:.1f} to {last / 1024:.1f} MiB\n"
        )
