"""Owner, mode and type of an object kept in an xattr in place of its real ones: the names, the value, and a
stat result with the value in it. Reads and writes no file.

For uppers and layers of somebody who may neither chown nor mknod, or that lie where modes cannot be kept
(NFS, `force_mask`). Sources: containers/storage pkg/idtools (`SetContainersOverrideXattr`); fuse-overlayfs's
option `xattr_permissions`.

    value = UID ":" GID ":" MODE [ ":" TYPE ]      decimal, decimal, octal
    TYPE  = dir | file | symlink | pipe | socket | block-MAJOR-MINOR | char-MAJOR-MINOR

Only regular files and directories carry one: `user.` xattrs exist on nothing else. fuse-overlayfs 1.10 writes
the type's bits into MODE, no TYPE, and reads none.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import Final

#: containers/storage's, and that of later fuse-overlayfs for `xattr_permissions=2`.
CONTAINERS: Final = "user.containers.override_stat"
#: fuse-overlayfs 1.10's for `xattr_permissions=2`; later ones go on with it where they find it.
FUSE_OVERLAYFS: Final = "user.fuseoverlayfs.override_stat"
#: fuse-overlayfs's for `xattr_permissions=1`.
PRIVILEGED: Final = "security.fuseoverlayfs.override_stat"
_READ_ORDER: Final = (PRIVILEGED, FUSE_OVERLAYFS, CONTAINERS)

_TYPES: Final = {
    "dir": stat.S_IFDIR,
    "file": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "pipe": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "block": stat.S_IFBLK,
    "char": stat.S_IFCHR,
}
_NAMES: Final = {kind: name for name, kind in _TYPES.items()}
#: Not compiled before it is needed: it would be a millisecond of every start.
_VALUE: Final = rb"([0-9]{1,10}):([0-9]{1,10}):([0-7]{1,7})(?::([a-z]+)(?:-([0-9]{1,10})-([0-9]{1,10}))?)?"
_MAX_ID: Final = 0xFFFFFFFE
_DEVICES: Final = ("block", "char")


@dataclass(frozen=True, slots=True)
class Override:
    uid: int
    gid: int
    #: permission bits with setuid, setgid and sticky
    mode: int
    #: S_IF constant; None: that of the object
    kind: int | None = None
    rdev: int = 0


def encode(override: Override) -> bytes:
    value = f"{override.uid}:{override.gid}:0{override.mode:o}"
    if override.kind is None:
        return value.encode()
    value += f":{_NAMES[override.kind]}"
    if override.kind in (stat.S_IFBLK, stat.S_IFCHR):
        value += f"-{os.major(override.rdev)}-{os.minor(override.rdev)}"
    return value.encode()


def decode(value: bytes) -> Override | None:
    """None for what is no such value."""
    found = re.fullmatch(_VALUE, value.rstrip(b"\0"))
    if found is None:
        return None
    uid, gid, mode = int(found[1]), int(found[2]), int(found[3], 8)
    if max(uid, gid) > _MAX_ID:
        return None
    if found[4] is None:
        return Override(uid, gid, mode & 0o7777)
    name = found[4].decode()
    if name not in _TYPES or (name in _DEVICES) != (found[5] is not None):
        return None
    rdev = 0
    if name in _DEVICES:
        major, minor = int(found[5]), int(found[6])
        if major >= 1 << 12 or minor >= 1 << 20:  # what the kernel's dev_t holds
            return None
        rdev = os.makedev(major, minor)
    return Override(uid, gid, mode & 0o7777, _TYPES[name], rdev)


def of(st: os.stat_result) -> Override:
    """What to keep so that an object is shown as `st` says. The type of a directory or a regular file is its
    own and is left out, as fuse-overlayfs leaves it."""
    kind = stat.S_IFMT(st.st_mode)
    plain = kind in (stat.S_IFDIR, stat.S_IFREG)
    rdev = 0 if plain else st.st_rdev
    return Override(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode), None if plain else kind, rdev)


def may_carry(st: os.stat_result) -> bool:
    return stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode)


def apply(st: os.stat_result, value: bytes) -> os.stat_result:
    """`st` with what `value` says in it; as it is where that is nonsense: a directory stays one, and nothing
    becomes one."""
    found = decode(value)
    if found is None:
        return st
    kind = stat.S_IFMT(st.st_mode)
    if found.kind is not None and kind == stat.S_IFREG and found.kind != stat.S_IFDIR:
        kind = found.kind
    return changed(st, mode=found.mode, uid=found.uid, gid=found.gid, kind=kind, rdev=found.rdev)


#: What else is used of os.stat_result than its sequence part.
_REST: Final = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks", "st_rdev")


def changed(
    st: os.stat_result,
    *,
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    kind: int | None = None,
    rdev: int | None = None,
) -> os.stat_result:
    """`st` with other permission bits, owners, type or device; None: as it was."""
    kind = stat.S_IFMT(st.st_mode) if kind is None else kind
    permissions = stat.S_IMODE(st.st_mode) if mode is None else mode
    sequence = list(st)
    sequence[0] = kind | permissions
    sequence[4] = st.st_uid if uid is None else uid
    sequence[5] = st.st_gid if gid is None else gid
    rest = {name: getattr(st, name) for name in _REST}
    if rdev is not None:
        rest["st_rdev"] = rdev
    return os.stat_result(sequence, rest)


def carried_by(present: list[str]) -> tuple[str, ...]:
    """Which names a layer keeps its attributes in, going by the xattrs of its root; in the order to look."""
    return tuple(name for name in _READ_ORDER if name in present)


def names_of_upper(option: int, present: list[str]) -> tuple[str, ...]:
    """The names that an upper is read by under `xattr_permissions=option`, the first being written; `present`
    are the xattrs of its root. A fresh upper gets the form that every fuse-overlayfs reads."""
    if option == 1:
        return (PRIVILEGED,)
    if CONTAINERS in present and FUSE_OVERLAYFS not in present:
        return (CONTAINERS, FUSE_OVERLAYFS)
    return (FUSE_OVERLAYFS, CONTAINERS)


def private_mode(mode: int, *, is_dir: bool) -> int:
    """The real mode of an object that is shown with `mode`: nobody else may do more than that allows, its
    owner, who serves the mount, what he needs; no setuid on disk."""
    return mode & 0o777 | (0o700 if is_dir else 0o600)
