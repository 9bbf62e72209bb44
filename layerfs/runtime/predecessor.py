"""Waiting for the mount that was here before: its mount point is free at once, but its daemon still writes.

`umount` and `fusermount3 -u` return when the mount is gone from the tree; the daemon then syncs the upper and
lets go of its locks. podman mounts a container again right after unmounting it (`podman diff` after `podman
umount`), and must not be told that the directories are in use. Decides nothing about what a lock means.
"""

from __future__ import annotations

import os
import re
import select
import time

from layerfs.fdutil import OwnedFd
from layerfs.runtime.mounts import mounts_of
from layerfs.upper.work import LOCK_NAME
from layerfs.vfs.checks import is_locked

#: Seconds to wait for a daemon that writes; and for one that may be kept by open files in a mount that was
#: detached (`umount -l`), or of which this kernel does not tell whether it is mounted.
_WRITING, _KEPT = 60.0, 5.0
_LOOK_AGAIN_MS = 20


def wait_until_gone(work: str) -> None:
    """Returns when nobody holds the lock of a work directory, or when whoever does is not about to end."""
    try:
        directory = OwnedFd(os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        lock = OwnedFd(os.open(LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd))
    except OSError:
        return  # no mount was here yet, or it is not ours to read
    if not is_locked(lock.fd):
        return
    began = time.monotonic()
    while (holder := _holder(lock.fd)) is not None:
        connections = _connections(holder)
        if connections is None or any(_is_mounted(holder, number) for number in connections):
            return
        try:
            ending = OwnedFd(os.pidfd_open(holder))
        except OSError:
            continue  # it ended; and another one may have come
        poll = select.poll()
        poll.register(ending.fd, select.POLLIN)
        poll.poll(_LOOK_AGAIN_MS)
        if not is_locked(lock.fd):
            return
        if time.monotonic() - began > (_KEPT if connections else _WRITING):
            return


def _holder(fd: int) -> int | None:
    """The process that holds a flock(2) on the file of `fd` (proc_locks(5)); None when it cannot be told."""
    st = os.fstat(fd)
    file = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}:{st.st_ino}"
    try:
        with open("/proc/locks") as locks:
            found = re.search(rf"^\d+: FLOCK +\S+ +WRITE +(\d+) {file} ", locks.read(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) or None if found else None


def _is_mounted(pid: int, connection: int) -> bool:
    """Whether a connection that a process holds is that of a mount. False also while that is not clear: its
    number is the device's, which is free for the next mount once that is gone, so while another process holds
    one of that number the mount may be that one's.
    """
    device = os.makedev(0, connection)
    before = mounts_of(device)
    if not before or any(
        connection in (_connections(int(other)) or ())
        for other in os.listdir("/proc")
        if other.isdigit() and int(other) != pid
    ):
        return False
    return not before.keys().isdisjoint(mounts_of(device))  # that one may have come and gone meanwhile


def _connections(pid: int) -> list[int] | None:
    """Numbers of the FUSE connections that a process holds; None where we may not look, or where the kernel
    does not tell them (before Linux 6.10 or so)."""
    numbers = []
    directory = f"/proc/{pid}/fd"
    try:
        for fd in os.listdir(directory):
            if os.readlink(f"{directory}/{fd}") != "/dev/fuse":
                continue
            with open(f"/proc/{pid}/fdinfo/{fd}") as file:
                number = re.search(r"^fuse_connection:\s*(\d+)", file.read(), re.MULTILINE)
            if number is None:
                return None
            numbers.append(int(number[1]))
    except FileNotFoundError:
        return []  # it ended, or closed one meanwhile: looked at again
    except OSError:
        return None
    return numbers
