"""The mount itself, as runtimes use it: seen in other mount namespaces, taken away under a container, ended
with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.mounts import PATIENCE, Layerfs, layerfs_command
from tests.support.processes import eventually
from tests.support.stack import Stack

from . import runtimes
from .runtimes import find, make_bundle, run_here

Make = Callable[..., Layerfs]
_libc = ctypes.CDLL(None, use_errno=True)


def mounted_for(pid: int, path: Path) -> list[str]:
    """Types of what process `pid` sees mounted on `path`."""
    with open(f"/proc/{pid}/mountinfo") as file:
        return [line.split(" - ")[1].split()[0] for line in file if line.split()[4] == os.fspath(path)]


@contextmanager
def another_namespace(propagation: str) -> Iterator[int]:
    """A process in a mount namespace of its own."""
    command = ["unshare", "--mount", "--propagation", propagation, "sh", "-c", "echo ready; exec sleep 60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_seen_in_namespaces_that_follow_ours(make_stack: type[Stack]) -> None:
    """A runtime that was started before sees the mount come and go where its namespace follows ours, and
    nothing of it where it is private.
    """
    stack = make_stack()
    (stack.lowers[0] / "f").write_text("f")
    mounts.bind(stack.dir, stack.dir)
    try:
        mounts.mount("none", stack.dir, "none", mounts.MS_SHARED)
        with another_namespace("slave") as follower, another_namespace("private") as private:
            with Layerfs(stack) as m:
                assert mounted_for(follower, m.mnt) == ["fuse.layerfs"]
                assert mounted_for(private, m.mnt) == []
                inside = ["nsenter", "--mount", "--target", str(follower), "cat", m.mnt / "f"]
                assert run_here(*inside).stdout == "f"
            # Closing has waited for the daemon, which ends with the last of its mounts.
            assert mounted_for(follower, stack.mnt) == []
    finally:
        mounts.umount(stack.dir, mounts.MNT_DETACH)


def test_a_private_copy_keeps_the_daemon(make_mount: Make) -> None:
    """Unmounted here while a container has it as its root: said so, and it works there until the last
    process has ended.
    """
    m = make_mount()
    script = 'echo ready; read line; echo "$line" >/etc/motd; cat /etc/motd'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", runtimes.pivot_script()]
    process = subprocess.Popen(
        [*command, m.mnt, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    done = m.run(*layerfs_command(), "umount", m.mnt)
    assert done.returncode == 0 and "the daemon goes on" in done.stderr
    assert not os.path.ismount(m.mnt) and m.pids()
    out, _ = process.communicate("still here\n", timeout=PATIENCE)
    assert out == "still here\n" and process.returncode == 0
    assert m.wait_gone()
    mounts.live.remove(m)
    assert (m.stack.upper or Path()).joinpath("etc", "motd").read_text() == "still here\n"


def test_busy_while_a_chroot_works_in_it(make_mount: Make) -> None:
    """In the same namespace it is busy: refused, and nothing is lost; --lazy detaches it."""
    m = make_mount()
    command = [find("chroot") or "chroot", m.mnt, "/bin/sh", "-c", "cd /etc; echo ready; read line; cat motd"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    done = m.run(*layerfs_command(), "umount", m.mnt)
    assert done.returncode == 1 and "busy" in done.stderr and os.path.ismount(m.mnt)
    assert m.run(*layerfs_command(), "umount", "--lazy", m.mnt).returncode == 0
    assert not os.path.ismount(m.mnt)
    assert process.communicate("\n", timeout=PATIENCE)[0] == "welcome\n"
    assert m.wait_gone()
    mounts.live.remove(m)


@pytest.mark.parametrize("end", ["exit", "kill", "daemon"])
def test_life_of_a_container(end: str, make_mount: Make) -> None:
    """runc create, start, exec, kill, delete: the mount is one and the same inside and outside meanwhile, and
    ends as if nobody had been there. `daemon`: it is killed under the container, which then only gets errors.
    """
    if find("runc") is None:
        pytest.skip("not installed: runc")
    m = make_mount()
    bundle = make_bundle(m.mnt, "touch /run/up; while ! test -e /run/stop; do sleep 0.05; done")
    runc = [find("runc") or "runc", "--root", bundle / "state"]
    name = f"layerfs-life-{os.getpid()}"
    log = os.open(bundle / "out", os.O_RDWR | os.O_CREAT)

    def say(*words: str | os.PathLike[str]) -> runtimes.Run:
        return run_here(*runc, *words)

    try:
        create = [*runc, "create", "--bundle", bundle, name]  # the container keeps its streams
        made = subprocess.run(create, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60)
        assert made.returncode == 0, os.pread(log, 4096, 0)
        assert say("start", name).returncode == 0
        assert eventually((m.mnt / "run" / "up").exists)
        (m.mnt / "etc" / "from-outside").write_text("outside\n")
        done = say("exec", name, "/bin/sh", "-c", "cat /etc/from-outside; echo inside >/etc/from-inside")
        assert (done.returncode, done.stdout) == (0, "outside\n"), done
        assert (m.mnt / "etc" / "from-inside").read_text() == "inside\n"
        if end == "exit":
            (m.mnt / "run" / "stop").touch()
        elif end == "kill":
            say("kill", name, "KILL")
        else:
            m.kill(signal.SIGKILL)
            assert say("exec", name, "/bin/ls", "/").returncode != 0
            say("kill", name, "KILL")
        assert eventually(lambda: '"status": "stopped"' in say("state", name).stdout)
        assert say("delete", name).returncode == 0
        assert say("list", "--quiet").stdout == ""
    finally:
        say("delete", "--force", name)
        os.close(log)
        subprocess.run(["rm", "-rf", bundle], check=True)
    if end == "daemon":
        with pytest.raises(OSError, match="not connected"):
            os.statvfs(m.mnt)
    m.close()
    assert mounts.mounts_below(m.stack.dir) == [] and m.pids() == []


def test_nothing_mounted_inside_outlives_the_container(make_mount: Make) -> None:
    """What a runtime mounts in the root stays in its namespace: the mount point outside is as it was."""
    for runtime in runtimes.ALL:
        if runtime.why_not() is None:
            m = make_mount()
            runtime.start(m.mnt, "mount -t tmpfs none /mnt; mount --bind /etc /mnt", False, run_here)
            assert [point for point, _ in mounts.mounts_below(m.mnt)] == [str(m.mnt)], runtime.name
            m.close()
