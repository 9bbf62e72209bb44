"""Whether the kernel may read and write files itself: found by trying, on a file system that is mounted
nowhere.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from typing import Final

from layerfs.fdutil import OwnedFd, fs_magic, new_file_system

_DEVICE: Final = "/dev/fuse"
#: linux/fuse.h: FUSE_PASSTHROUGH among the flags of INIT, and its FUSE_INIT_EXT; Linux 6.9.
_PASSTHROUGH: Final = 1 << 37
_INIT_EXT: Final = 1 << 30
#: FUSE_DEV_IOC_BACKING_OPEN: fd, flags, padding.
_BACKING_OPEN: Final = 0x4010E501
_BACKING_MAP: Final = struct.Struct("=iIQ")
#: Of fuse_in_header and fuse_init_in: unique; flags and flags2.
_UNIQUE: Final = struct.Struct("=8xQ")
_OFFERED: Final = struct.Struct("=40x12xII")
#: fuse_out_header and fuse_init_out.
_REPLY: Final = struct.Struct("=IiQIIIIHHIIHHIIH22x")
#: More than the kernel demands (fs/fuse/dev.c fuse_dev_do_read).
_ROOM: Final = 1 << 20
#: File systems that lie on others, or may: overlay, ecryptfs, FUSE.
_STACKED: Final = frozenset((0x794C7630, 0xF15F, 0x65735546))

_TOO_OLD = "this kernel has no FUSE passthrough (Linux 6.9 and CONFIG_FUSE_PASSTHROUGH)"
_NOT_ROOT = "it takes CAP_SYS_ADMIN in the initial user namespace"


def obstacle() -> str | None:
    """Why the kernel does not let this process have passthrough; None: it does."""
    try:
        return _try()
    except PermissionError:
        return _NOT_ROOT
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return _TOO_OLD
        return f"it was tried and failed: {error.strerror}"


def _try() -> str | None:
    device = OwnedFd(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    options = {b"fd": b"%d" % device.fd, b"rootmode": b"40000", b"user_id": b"0", b"group_id": b"0"}
    made = OwnedFd(new_file_system(b"fuse", options))
    request = os.read(device.fd, _ROOM)
    flags, more = _OFFERED.unpack_from(request) if len(request) >= _OFFERED.size else (0, 0)
    if not (more << 32 if flags & _INIT_EXT else 0) & _PASSTHROUGH:
        return _TOO_OLD
    (unique,) = _UNIQUE.unpack_from(request)
    init = (7, 40, 1 << 17, _INIT_EXT, 12, 9, 1 << 17, 1, 32, 0, _PASSTHROUGH >> 32, 1, 0)
    os.write(device.fd, _REPLY.pack(_REPLY.size, 0, unique, *init))
    file = OwnedFd(os.memfd_create("layerfs-passthrough"))
    fcntl.ioctl(device.fd, _BACKING_OPEN, _BACKING_MAP.pack(file.fd, 0, 0))
    del made
    return None


def stack_depth(layers: Iterable[bytes]) -> int:
    """`max_stack_depth` for files in the directories with these paths: 2 where one is on a file system that
    lies on others itself; then no overlayfs can lie on the mount. Raises OSError."""
    return 2 if any(fs_magic(path) in _STACKED for path in layers) else 1
