"""What must be true of /dev/fuse and the mount point before a daemon is started. The layers are
`layerfs.vfs.checks`'.
"""

from __future__ import annotations

import errno
import os
import stat

from layerfs.errors import MountError, UsageError
from layerfs.runtime.mounts import clear_dead, find_fusermount
from layerfs.vfs.checks import reason, shown

FUSE_DEVICE = "/dev/fuse"
FUSE_CONF = "/etc/fuse.conf"


def check_fuse_device() -> None:
    """Raises MountError when /dev/fuse is missing or refused. Opening it has no effect until something is
    mounted.
    """
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        text = {
            errno.ENOENT: f"{FUSE_DEVICE} does not exist: modprobe fuse, or pass the device in",
            errno.ENODEV: f"{FUSE_DEVICE}: this kernel has no FUSE (modprobe fuse)",
            errno.ENXIO: f"{FUSE_DEVICE}: this kernel has no FUSE (modprobe fuse)",
            errno.EACCES: f"{FUSE_DEVICE}: permission denied (its mode should be 0666)",
            errno.EPERM: f"{FUSE_DEVICE}: not permitted (a container needs the device allowed)",
        }.get(error.errno or 0, f"{FUSE_DEVICE}: {reason(error)}")
        raise MountError(text, error.errno) from None


def user_allow_other() -> bool:
    """Whether /etc/fuse.conf lets ordinary users say allow_other."""
    try:
        with open(FUSE_CONF, errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


def check_user_mount(fuse_options: frozenset[str]) -> None:
    """What an ordinary user needs besides. Raises MountError."""
    if os.geteuid() == 0:
        return
    if find_fusermount() is None:
        raise MountError(
            "fusermount3 is not installed (package fuse3): an ordinary user cannot mount without it"
        )
    if fuse_options & {"allow_other", "allow_root"} and not user_allow_other():
        raise MountError(f"allow_other needs the line user_allow_other in {FUSE_CONF}", errno.EPERM)


def check_mountpoint(path: str) -> tuple[int, bool]:
    """The device number seen at `path` before mounting, and whether a dead layerfs mount was cleared off it.

    Raises UsageError, MountError."""
    if not path:
        raise UsageError("the mount point is an empty name")
    try:
        cleared = clear_dead(path)
        status = os.stat(path)
    except ValueError:
        raise UsageError(f"mount point {shown(path)}: not a path") from None
    except OSError as error:
        text = {errno.ENOENT: "no such directory", errno.ENOTDIR: "not a directory"}.get(
            error.errno or 0, reason(error)
        )
        raise MountError(f"mount point {shown(path)}: {text}", error.errno) from None
    if not stat.S_ISDIR(status.st_mode):
        raise MountError(f"mount point {shown(path)}: not a directory", errno.ENOTDIR)
    if os.geteuid() != 0:
        # The rules of fusermount3 (util/fusermount.c `check_perm`), said before it says them.
        if not os.access(path, os.W_OK, effective_ids=True):
            raise MountError(f"mount point {shown(path)}: not writable by you", errno.EACCES)
        if status.st_mode & stat.S_ISVTX and status.st_uid != os.geteuid():
            raise MountError(f"mount point {shown(path)}: a sticky directory that is not yours", errno.EACCES)
    return status.st_dev, cleared
