"""A mount right after an unmount, while the daemon of the one before still writes: it waits its turn. (podman
unmounts a container and mounts it again to compare.)"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.containers.store import Store
from tests.support import mounts
from tests.support.mounts import Layerfs
from tests.support.processes import eventually
from tests.support.stack import Stack

pytestmark = pytest.mark.root


@pytest.mark.usefixtures("root")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["fusermount3", "umount2", "detached"])
def test_the_next_mount_waits_for_the_daemon_of_the_last(stack: Stack, how: str) -> None:
    first = Layerfs(stack).open()
    (pid,) = first.pids()
    (stack.mnt / "f").write_text("written")
    os.kill(pid, signal.SIGSTOP)
    command = [*first.command()]
    try:
        if how == "fusermount3":
            subprocess.run(["fusermount3", "-u", stack.mnt], check=True, timeout=20)
        else:  # umount(8) would ask the stopped daemon
            mounts.umount(stack.mnt, mounts.MNT_DETACH if how == "detached" else 0)
        assert not mounts.mounts_below(stack.mnt)
        second = subprocess.Popen(command, env=first.env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # It has come to where it waits: asleep in poll(2), and neither failed nor mounted.
        assert eventually(lambda: "poll" in Path(f"/proc/{second.pid}/wchan").read_text())
        assert second.poll() is None and not mounts.mounts_below(stack.mnt)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert second.wait(20) == 0, second.stderr and second.stderr.read()
    assert (stack.mnt / "f").read_text() == "written"
    assert eventually(lambda: pid not in first.pids())
    first.close()


def test_podman_looks_at_a_container_just_unmounted(store: Store) -> None:
    store.podman("create", "--name", "still", "base", "true")
    for number in range(5):
        point = Path(store.podman("mount", "still").strip())
        (point / f"srv/new{number}").write_bytes(os.urandom(3_000_000))
        store.podman("umount", "still")
        assert f"A /srv/new{number}" in store.podman("diff", "still").splitlines()
    store.assert_idle()
    store.podman("rm", "-a", "-f")
