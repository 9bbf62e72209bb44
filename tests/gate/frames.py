"""FUSE's messages as bytes (linux/fuse.h, protocol 7.38), from the kernel and to it. Decides nothing."""

from __future__ import annotations

import os
import struct

LOOKUP, FORGET, GETATTR, SETATTR, READLINK = 1, 2, 3, 4, 5
OPEN, READ, WRITE, STATFS, RELEASE = 14, 15, 16, 17, 18
FSYNC, SETXATTR, GETXATTR, LISTXATTR, FLUSH, INIT = 20, 21, 22, 23, 25, 26
OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, CREATE, INTERRUPT, IOCTL = 27, 28, 29, 30, 35, 36, 39
BATCH_FORGET, FALLOCATE, READDIRPLUS, LSEEK = 42, 43, 44, 46
COPY_FILE_RANGE, TMPFILE, STATX, COPY_FILE_RANGE_64 = 47, 51, 52, 53
#: What no request of 64 has.
UNKNOWN = 63

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
FORGET_IN = struct.Struct("<Q")
FORGET_ONE = struct.Struct("<QQ")
BATCH_FORGET_IN = struct.Struct("<II")
GETATTR_IN = struct.Struct("<IIQ")
GETXATTR_IN = struct.Struct("<II")
GETXATTR_OUT = struct.Struct("<II")
OPEN_IN = struct.Struct("<II")
OPEN_OUT = struct.Struct("<QIi")
READ_IN = struct.Struct("<QQIIQII")
RELEASE_IN = struct.Struct("<QIIQ")
LSEEK_IN = struct.Struct("<QQII")
WRITE_IN = struct.Struct("<QQIIQII")
WRITE_OUT = struct.Struct("<II")
IOCTL_IN = struct.Struct("<QIIQII")
LSEEK_OUT = struct.Struct("<Q")
ATTR = struct.Struct("<6Q10I")
ENTRY_OUT = struct.Struct("<QQQQII")  # and ATTR
ATTR_OUT = struct.Struct("<QII")  # and ATTR
DIRENT = struct.Struct("<QQII")  # and the name
STATFS_OUT = struct.Struct("<5Q4I24x")
INIT_IN = struct.Struct("<IIIII44x")
INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")

FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3
FOPEN_PASSTHROUGH = 1 << 7
PASSTHROUGH = 1 << 37
ALLOW_IDMAP = 1 << 40
INIT_EXT = 1 << 30
ATOMIC_O_TRUNC = 1 << 3
HANDLE_KILLPRIV_V2 = 1 << 28
SETXATTR_EXT = 1 << 29
WRITE_CACHE = 1 << 0
WRITE_KILL_SUIDGID = 1 << 2
#: ioctls for flags and attributes of inodes (linux/fs.h): get and set, 64 and 32 bits wide.
INODE_IOCTLS = (0x80086601, 0x40086602, 0x80046601, 0x40046602, 0x801C581F, 0x401C5820)
#: Seconds: as long as the kernel can remember.
FOR_EVER = 100_000_000

_64 = (1 << 64) - 1
_32 = (1 << 32) - 1


def frame(opcode: int, node: int, body: bytes = b"", *, unique: int = 7, uid: int = 0) -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, node, uid, 0, 1, 0, 0) + body


def lookup(node: int, name: bytes) -> bytes:
    return frame(LOOKUP, node, name + b"\0")


def getattr(node: int) -> bytes:
    return frame(GETATTR, node, GETATTR_IN.pack(0, 0, 0))


def forget(node: int, count: int) -> bytes:
    return frame(FORGET, node, FORGET_IN.pack(count))


def batch_forget(*nodes: tuple[int, int]) -> bytes:
    return frame(
        BATCH_FORGET, 0, BATCH_FORGET_IN.pack(len(nodes), 0) + b"".join(FORGET_ONE.pack(*n) for n in nodes)
    )


def getxattr(node: int, name: bytes, size: int = 0) -> bytes:
    return frame(GETXATTR, node, GETXATTR_IN.pack(size, 0) + name + b"\0")


def listxattr(node: int, size: int = 0) -> bytes:
    return frame(LISTXATTR, node, GETXATTR_IN.pack(size, 0))


def open(node: int, flags: int = os.O_RDONLY) -> bytes:
    return frame(OPEN, node, OPEN_IN.pack(flags, 0))


def read(node: int, handle: int, offset: int, size: int, opcode: int = READ) -> bytes:
    return frame(opcode, node, READ_IN.pack(handle, offset & _64, size, 0, 0, 0, 0))


def readdirplus(node: int, handle: int, offset: int, size: int = 4096) -> bytes:
    return read(node, handle, offset, size, READDIRPLUS)


def write(node: int, handle: int, offset: int, data: bytes, *, flags: int = 0, how: int = 0) -> bytes:
    """`how`: flags of open(2)."""
    return frame(WRITE, node, WRITE_IN.pack(handle, offset & _64, len(data), flags, 0, how, 0) + data)


def ioctl(node: int, handle: int, command: int) -> bytes:
    return frame(IOCTL, node, IOCTL_IN.pack(handle, 0, command, 0, 0, 0))


def release(node: int, handle: int, opcode: int = RELEASE) -> bytes:
    return frame(opcode, node, RELEASE_IN.pack(handle, 0, 0, 0))


def flush(node: int, handle: int) -> bytes:
    return frame(FLUSH, node, struct.pack("<QIIQ", handle, 0, 0, 0))


def fsync(node: int, handle: int) -> bytes:
    return frame(FSYNC, node, struct.pack("<QII", handle, 0, 0))


def lseek(node: int, handle: int, offset: int, whence: int) -> bytes:
    return frame(LSEEK, node, LSEEK_IN.pack(handle, offset & _64, whence, 0))


def reply(unique: int, error: int = 0, payload: bytes = b"") -> bytes:
    """To the kernel; `error` is an errno."""
    assert not (error and payload)
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), -error, unique) + payload


def attributes(st: os.stat_result, ino: int) -> bytes:
    times = (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)
    return ATTR.pack(
        ino,
        st.st_size,
        st.st_blocks,
        *(time // 10**9 & _64 for time in times),
        *(time % 10**9 for time in times),
        st.st_mode,
        st.st_nlink,
        st.st_uid,
        st.st_gid,
        st.st_rdev & _32,
        st.st_blksize,
        0,
    )


def entry(st: os.stat_result, ino: int) -> bytes:
    return ENTRY_OUT.pack(ino, 0, FOR_EVER, FOR_EVER, 0, 0) + attributes(st, ino)


#: A name that is absent, for ever.
ABSENT = ENTRY_OUT.pack(0, 0, FOR_EVER, 0, 0, 0) + bytes(ATTR.size)
#: `.` and `..` in a listing: no node.
NO_ENTRY = bytes(ENTRY_OUT.size + ATTR.size)


def listed(name: bytes, ino: int, next_offset: int, kind: int, entry_out: bytes = NO_ENTRY) -> bytes:
    """One name of a READDIRPLUS reply. `kind`: the file type's bits of a mode."""
    item = entry_out + DIRENT.pack(ino, next_offset, len(name), kind >> 12) + name
    return item + bytes(-len(item) % 8)


def names_of(payload: bytes) -> list[bytes]:
    """The names in a READDIRPLUS reply."""
    found, at = [], 0
    while at < len(payload):
        at += len(NO_ENTRY)
        length = DIRENT.unpack_from(payload, at)[2]
        at += DIRENT.size
        found.append(payload[at : at + length])
        at += length + -length % 8
    return found


#: struct fuse_interrupt_in: the request that is interrupted.
INTERRUPT_IN = struct.Struct("=Q")
