"""Descriptor-relative system calls: what Python's `os` lacks, typed and raising OSError. No policy."""

from layerfs.fdutil.copying import Cancelled, Copied, copy_data, copy_range
from layerfs.fdutil.owned import FdPool, OwnedFd
from layerfs.fdutil.syscalls import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    RESOLVE_INSIDE,
    RESOLVE_INSIDE_MOUNT,
    birth_time,
    clone_mount,
    fallocate,
    fs_magic,
    fs_uuid,
    is_open_for_writing,
    name_to_handle,
    new_file_system,
    openat2,
    protect_mount,
    renameat2,
    syncfs,
)
from layerfs.fdutil.temporary import temporary_place
from layerfs.fdutil.xattrs import at_path, fd_path, lgetxattr, lsetxattr, proc_path, stand_in_proc

__all__ = [
    "RENAME_EXCHANGE",
    "RENAME_NOREPLACE",
    "RENAME_WHITEOUT",
    "RESOLVE_INSIDE",
    "RESOLVE_INSIDE_MOUNT",
    "Cancelled",
    "Copied",
    "FdPool",
    "OwnedFd",
    "at_path",
    "birth_time",
    "clone_mount",
    "copy_data",
    "copy_range",
    "fallocate",
    "fd_path",
    "fs_magic",
    "fs_uuid",
    "is_open_for_writing",
    "lgetxattr",
    "lsetxattr",
    "name_to_handle",
    "new_file_system",
    "openat2",
    "proc_path",
    "protect_mount",
    "renameat2",
    "stand_in_proc",
    "syncfs",
    "temporary_place",
]
