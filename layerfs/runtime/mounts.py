"""Finds, verifies and takes away mounts. Starts nothing and knows nothing of layers.

A dead mount (its daemon was killed) answers ENOTCONN to everything but this: so mount points are found by
text in mountinfo, and only the directory above one is ever resolved.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from layerfs.errors import BusyError, MountError
from layerfs.fdutil import fs_magic
from layerfs.fdutil.mountinfo import MountEntry, read_mountinfo
from layerfs.vfs.checks import reason, shown

FSTYPE = b"fuse.layerfs"
FUSE_SUPER_MAGIC = 0x65735546

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def absolute(path: str) -> str:
    """`path` from the root on, not normalised: `..` behind a symlink stays the kernel's business."""
    if path.startswith("/"):
        return path
    try:
        return os.path.join(os.getcwd(), path)
    except OSError:  # the working directory was removed: the kernel may still resolve what hangs below it
        return path


def resolve_target(path: str) -> bytes:
    """The name under which mountinfo lists a mount on `path`; the last component is not touched if it is
    dead.

    Raises OSError when a directory above it cannot be resolved."""
    try:
        return os.fsencode(os.path.realpath(path, strict=True))
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.EACCES, errno.EIO, errno.ECONNABORTED):
            raise
    parent, name = os.path.split(absolute(path).rstrip("/"))
    if name in (".", "..", ""):
        return os.fsencode(os.path.realpath(path))
    return os.path.join(os.fsencode(os.path.realpath(parent, strict=True)), os.fsencode(name))


def mount_at(path: str) -> MountEntry | None:
    """The topmost mount whose mount point is `path`, of whatever type; None when nothing is mounted there.

    Raises OSError as `resolve_target`."""
    target = resolve_target(path)
    found = None
    for entry in read_mountinfo():
        if entry.target == target:
            found = entry
    return found


def is_dead(path: str) -> bool:
    """Whether the file system at `path` has lost its daemon.

    Asked by statfs(2): the kernel would answer stat(2) from what it remembers of the root for as long as it
    was told to.
    """
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def detach(target: bytes, *, lazy: bool) -> None:
    """Unmount the topmost mount on `target`: umount2(2) where we may, else by fusermount3.

    Raises BusyError, MountError."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if _libc.umount2(target, flags) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EPERM and os.geteuid() != 0:
        _fusermount(target, lazy=lazy)
        return
    if number == errno.EBUSY:
        raise BusyError(_busy(target))
    raise MountError(f"cannot unmount {shown(target)}: {os.strerror(number)}", number)


def _busy(target: bytes) -> str:
    return (
        f"{shown(target)} is busy: a process works in it or has a file open (--lazy detaches it all the same)"
    )


def find_fusermount() -> str | None:
    """The set-uid helper through which an ordinary user mounts and unmounts."""
    for name in ("fusermount3", "fusermount"):
        for directory in os.get_exec_path():
            candidate = os.path.join(directory, name)
            if os.access(candidate, os.X_OK):
                return candidate
    return None


def _fusermount(target: bytes, *, lazy: bool) -> None:
    import subprocess

    program = find_fusermount()
    if program is None:
        raise MountError(
            "fusermount3 is not installed (package fuse3): an ordinary user cannot unmount without it"
        )
    arguments: list[bytes | str] = [program, "-u", *(["-z"] if lazy else []), "--", target]
    done = subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode == 0:
        return
    said = done.stderr.decode(errors="backslashreplace").strip().splitlines()
    last = said[-1] if said else f"exit code {done.returncode}"
    if "busy" in last.lower():
        raise BusyError(_busy(target))
    raise MountError(f"cannot unmount {shown(target)}: {last}")


def clear_dead(path: str) -> bool:
    """Take dead layerfs mounts off `path`, however many lie on each other. True when there was one.

    Raises MountError when it cannot be taken away."""
    cleared = False
    while is_dead(path):
        entry = mount_at(path)
        if entry is None or entry.fstype != FSTYPE:
            break
        detach(entry.target, lazy=True)
        cleared = True
    return cleared


def verify(mountpoint: str, device_before: int) -> None:
    """Make sure that `mountpoint` now shows a FUSE file system that was not there before. Raises
    MountError.
    """
    try:
        now = os.stat(mountpoint)
        magic = fs_magic(mountpoint)
    except OSError as error:
        raise MountError(
            f"{shown(mountpoint)}: mounted, but does not answer: {reason(error)}", error.errno
        ) from None
    if magic != FUSE_SUPER_MAGIC or now.st_dev == device_before or not stat.S_ISDIR(now.st_mode):
        raise MountError(f"{shown(mountpoint)}: the mount is not visible here (another mount lies on it?)")


def mounts_of(device: int) -> dict[int, tuple[int, bytes]]:
    """Where a FUSE file system is mounted, in every mount namespace that we may look into: mount id -> (a
    process there, target).

    Mount ids are unique over all namespaces, but like device numbers they are given again once free: compare
    with what was there before.
    """
    found: dict[int, tuple[int, bytes]] = {}
    seen: set[str] = set()
    for name in sorted(os.listdir("/proc"), key=lambda name: name != str(os.getpid())):
        if not name.isdigit():
            continue
        try:
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            for entry in read_mountinfo(name):
                if entry.device == device and entry.fstype.startswith(b"fuse"):
                    found[entry.mount_id] = (int(name), entry.target)
        except OSError:
            continue
    return found


def serves(pid: int, device: int) -> bool:
    """Whether process `pid` holds the FUSE connection of the file system `device`. False where we may not
    look.
    """
    directory = f"/proc/{pid}/fd"
    try:
        for fd in os.listdir(directory):
            if os.readlink(f"{directory}/{fd}") != "/dev/fuse":
                continue
            with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as file:
                said = [line.split()[1] for line in file if line.startswith(b"fuse_connection:")]
            # Kernels that do not tell the connection's number (it is the device's minor) are believed on
            # sight.
            if not said or int(said[0]) == os.minor(device):
                return True
    except OSError:
        pass
    return False


def find_daemon(device: int) -> int | None:
    """The process that serves `device`, by looking at all that we may look at; for mounts that do not tell
    it.

    None also on kernels that do not tell which connection a descriptor of /dev/fuse belongs to."""
    found = [int(name) for name in os.listdir("/proc") if name.isdigit() and serves(int(name), device)]
    return found[0] if len(found) == 1 else None
