"""Lower layers that lie on an idmapped mount, found without it. Mounts nothing and maps nothing.

containers/storage, for a container with a user namespace, hands a mount program each layer through an
idmapped mount and `uidmapping=` besides (drivers/overlay `get`, where the kernel's overlayfs takes idmapped
layers): mapped twice, every owner is the overflow id, and containers on fuse-overlayfs do not start.
`uidmapping=` is about ids as the disk has them, so the layer is opened by another way to the same directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from layerfs.errors import MountError
from layerfs.fdutil import OwnedFd
from layerfs.fdutil.mountinfo import MountEntry, read_mountinfo


def without_idmaps(paths: Sequence[str]) -> list[str]:
    """For each of `paths` itself, or another one to the same directory that leads through no idmapped mount.

    Raises MountError when there is none. What cannot be opened is left to the checks of the layers."""
    mounts = {entry.mount_id: entry for entry in read_mountinfo()}
    return [_without_idmap(path, mounts) for path in paths]


def _without_idmap(path: str, mounts: Mapping[int, MountEntry]) -> str:
    try:
        fd = _open(path)
    except OSError:
        return path
    entry = mounts.get(_mount_id(fd))
    if entry is None or not _idmapped(entry):
        return path
    st = os.fstat(fd.fd)
    within = _within(entry, os.readlink(os.fsencode(f"/proc/self/fd/{fd.fd}")))
    for other in mounts.values():
        if other.device != entry.device or _idmapped(other) or not _is_below(within, other.root):
            continue
        way = os.path.join(other.target, within[len(other.root.rstrip(b"/")) :].lstrip(b"/"))
        try:
            found = _open(way)
        except OSError:
            continue
        # It may be covered by yet another mount.
        through = mounts.get(_mount_id(found))
        if os.path.samestat(os.fstat(found.fd), st) and through is not None and not _idmapped(through):
            return os.fsdecode(way)
    raise MountError(
        f"{path}: the layer lies on an idmapped mount and is mounted nowhere else: leave out"
        " uidmapping and gidmapping, or unmount it"
    )


def _open(path: str | bytes) -> OwnedFd:
    return OwnedFd(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


def _mount_id(fd: OwnedFd) -> int:
    with open(f"/proc/self/fdinfo/{fd.fd}") as file:
        found = re.search(r"^mnt_id:\s*(\d+)", file.read(), re.MULTILINE)
    return int(found[1]) if found else -1


def _idmapped(entry: MountEntry) -> bool:
    """proc(5) does not tell it yet: fs/proc_namespace.c show_mnt_opts, since Linux 5.12."""
    return b"idmapped" in entry.options.split(b",")


def _within(entry: MountEntry, path: bytes) -> bytes:
    """`path`, which leads into `entry`, as a path of the file system itself."""
    below = path[len(entry.target.rstrip(b"/")) :].lstrip(b"/")
    return os.path.join(entry.root, below) if below else entry.root


def _is_below(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")
