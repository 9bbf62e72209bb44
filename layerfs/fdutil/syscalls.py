"""System calls that Python's `os` module lacks, through ctypes. Call numbers are those of the generic table,
ioctl numbers those of x86, arm, riscv and s390 (elsewhere origins are not written and reflink is not tried:
both only help).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import struct
from collections.abc import Mapping

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
#: Nothing on the way leads out, or anywhere else: no `..` above the directory, no link.
RESOLVE_INSIDE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
#: Nor into what is mounted there.
RESOLVE_INSIDE_MOUNT = RESOLVE_INSIDE | RESOLVE_NO_XDEV

_NR_OPEN_TREE = 428
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442
_OPEN_TREE_CLONE = 1
_MAX_HANDLE = 128
_FS_IOC_GETFSUUID = 0x80111500
_AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_NOFOLLOW = 0x100
_STATX_BTIME = 0x800
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_MOUNT_ATTR_RDONLY = 0x01
_MOUNT_ATTR_ATIME = 0x70
_MOUNT_ATTR_NOATIME = 0x10

_MASK = struct.Struct("=I")
_BTIME = struct.Struct("=qI")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.syncfs.argtypes = [ctypes.c_int]
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
# The calls of the large file interface: where `long` has 64 bits these are the plain ones.
_fallocate = _libc.fallocate64
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _FileHandle(ctypes.Structure):
    _fields_ = [
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE),
    ]


_libc.name_to_handle_at.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(_FileHandle),
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
]


def _raise(name: bytes | None = None) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), os.fsdecode(name) if name is not None else None)


def openat2(dirfd: int, path: bytes, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2). Returns a new close-on-exec descriptor.

    Raises OSError: EXDEV and ELOOP also when `resolve` forbids the way."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    while True:
        fd = _libc.syscall(
            ctypes.c_long(_NR_OPENAT2),
            ctypes.c_int(dirfd),
            ctypes.c_char_p(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        # EAGAIN: a rename raced with a scoped lookup (openat2(2)); the way may simply be tried again.
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            _raise(path)


def clone_mount(path: bytes) -> int | None:
    """An O_PATH descriptor of `path` in a private, detached copy of its mount (open_tree(2)): without the
    mounts below it, and not keeping the mount itself busy. None where this process may not (it takes
    CAP_SYS_ADMIN) or the kernel cannot (before 5.2).

    Raises OSError when `path` itself is wrong."""
    at_fdcwd = -100
    fd = _libc.syscall(
        ctypes.c_long(_NR_OPEN_TREE),
        ctypes.c_int(at_fdcwd),
        ctypes.c_char_p(path),
        ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC),
    )
    if fd < 0 and ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS, errno.EINVAL):
        _raise(path)
    return int(fd) if fd >= 0 else None


def protect_mount(fd: int) -> None:
    """Makes the mount that `clone_mount` gave read-only, and has it move no access times. Does nothing where
    the kernel cannot (mount_setattr(2), Linux 5.12)."""
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOATIME, _MOUNT_ATTR_ATIME, 0, 0)
    _libc.syscall(
        ctypes.c_long(_NR_MOUNT_SETATTR),
        ctypes.c_int(fd),
        ctypes.c_char_p(b""),
        ctypes.c_uint(_AT_EMPTY_PATH),
        ctypes.c_char_p(attributes),
        ctypes.c_size_t(len(attributes)),
    )


def new_file_system(kind: bytes, options: Mapping[bytes, bytes]) -> int:
    """A descriptor of a new file system that is mounted nowhere (fsopen(2), Linux 5.2); it goes when that is
    closed. Raises OSError."""
    fd = int(_libc.syscall(ctypes.c_long(_NR_FSOPEN), ctypes.c_char_p(kind), ctypes.c_uint(_FSOPEN_CLOEXEC)))
    if fd < 0:
        _raise(kind)
    steps = [(_FSCONFIG_SET_STRING, key, value) for key, value in options.items()]
    for command, key, value in (*steps, (_FSCONFIG_CMD_CREATE, None, None)):
        done = _libc.syscall(
            ctypes.c_long(_NR_FSCONFIG),
            ctypes.c_int(fd),
            ctypes.c_uint(command),
            ctypes.c_char_p(key),
            ctypes.c_char_p(value),
            ctypes.c_int(0),
        )
        if done != 0:
            number = ctypes.get_errno()
            os.close(fd)
            raise OSError(number, os.strerror(number))
    return fd


def renameat2(olddir: int, old: bytes, newdir: int, new: bytes, flags: int = 0) -> None:
    """renameat2(2). Raises OSError (EINVAL also where the file system lacks the flag)."""
    if _libc.renameat2(olddir, old, newdir, new, flags) != 0:
        _raise(old)


def syncfs(fd: int) -> None:
    """syncfs(2): everything dirty on the file system of `fd`. Raises OSError, ENOSPC and EIO of earlier
    write-back included.
    """
    if _libc.syncfs(fd) != 0:
        _raise()


def name_to_handle(dirfd: int, name: bytes) -> tuple[int, bytes] | None:
    """File handle (type, bytes) of `name` in `dirfd`, or of `dirfd` itself when `name` is empty; None where
    the file system has none.

    Needs no privilege (opening a handle would). Symbolic links are not followed."""
    handle = _FileHandle(handle_bytes=_MAX_HANDLE)
    mount_id = ctypes.c_int()
    flags = _AT_EMPTY_PATH if not name else 0
    if _libc.name_to_handle_at(dirfd, name, ctypes.byref(handle), ctypes.byref(mount_id), flags) != 0:
        return None
    return handle.handle_type, bytes(handle.f_handle[: handle.handle_bytes])


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): with `mode` (`FALLOC_FL_*`), which Python's `posix_fallocate` does not take. Raises
    OSError: EOPNOTSUPP for what the file system cannot do.
    """
    while _fallocate(fd, mode, offset, length) != 0:
        if ctypes.get_errno() != errno.EINTR:
            _raise()


def birth_time(dirfd: int, name: bytes) -> int | None:
    """When `name` in `dirfd`, or `dirfd` itself when `name` is empty, was made, in ns since 1970 (statx(2)
    stx_btime); None where the file system does not say, or a seccomp filter knows no statx. Symbolic links
    are not followed. Raises OSError.
    """
    # struct statx has 256 bytes: u32 stx_mask at 0, stx_btime (s64 seconds, u32 nanoseconds) at 80.
    buffer = ctypes.create_string_buffer(256)
    flags = _AT_SYMLINK_NOFOLLOW if name else _AT_EMPTY_PATH
    if _libc.statx(dirfd, name, flags, _STATX_BTIME, buffer) != 0:
        if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
            return None
        _raise(name)
    if not _MASK.unpack_from(buffer)[0] & _STATX_BTIME:
        return None
    seconds, nanoseconds = _BTIME.unpack_from(buffer, 80)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def is_open_for_writing(fd: int) -> bool:
    """Whether anybody has the file open for writing, mappings included; `fd` is open for reading. A lease for
    reading is had where nobody has (fcntl(2)). True where the file system knows no leases."""
    try:
        # Whoever opened it for writing while we have the lease would send SIGIO, which ends a process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True
    return False


def fs_uuid(fd: int) -> bytes | None:
    """The 16-byte UUID of the file system that holds `fd` (ioctl FS_IOC_GETFSUUID, Linux 6.9), or None."""
    buffer = bytearray(17)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFSUUID, buffer)
    except OSError:
        return None
    return bytes(buffer[1:17]) if buffer[0] == 16 else None


def fs_magic(path: str | bytes) -> int:
    """`f_type` of statfs(2), which `os.statvfs` leaves out. Raises OSError."""
    # struct statfs is 120 bytes on 64-bit Linux and begins with a long f_type
    buffer = (ctypes.c_long * 32)()
    if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        _raise(os.fsencode(path))
    return int(buffer[0]) & 0xFFFFFFFF
