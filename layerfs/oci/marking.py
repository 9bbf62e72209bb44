"""Whiteouts and opaque marks in a layer directory that is being made: the best form that this user can write
there. The forms themselves are `overlay.whiteout`'s; an upper that is mounted writes its own (`upper`)."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from dataclasses import dataclass

from layerfs.fdutil import OwnedFd
from layerfs.overlay import whiteout
from layerfs.overlay.names import TRUSTED, USER, XattrNames


@dataclass(frozen=True, slots=True)
class Marks:
    """`device`: whiteouts are devices, else files. `opaque`: the xattr that marks a directory; None: a file
    in it does."""

    device: bool
    opaque: str | None

    @staticmethod
    def probe(directory: OwnedFd) -> Marks:
        """Tries it out in `directory`, and leaves it as it was but for its times. Raises OSError for a full
        or broken disk."""
        return Marks(_takes_devices(directory), _opaque_attribute(directory))

    def hide(self, directory: OwnedFd, name: bytes) -> None:
        """Writes a whiteout of `name`, which is not there."""
        if self.device:
            os.mknod(name, stat.S_IFCHR | 0o600, 0, dir_fd=directory.fd)
        else:
            _touch(directory, whiteout.PREFIX + name)

    def make_opaque(self, directory: OwnedFd) -> None:
        if self.opaque is not None:
            os.setxattr(directory.fd, self.opaque, whiteout.OPAQUE)
        else:
            _touch(directory, whiteout.OPAQUE_NAME)


def _takes_devices(directory: OwnedFd) -> bool:
    name = b".layerfs-probe-" + secrets.token_hex(8).encode()
    try:
        os.mknod(name, stat.S_IFCHR | 0o600, 0, dir_fd=directory.fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        return False
    try:
        return whiteout.is_whiteout_device(os.stat(name, dir_fd=directory.fd, follow_symlinks=False))
    finally:
        os.unlink(name, dir_fd=directory.fd)


def _opaque_attribute(directory: OwnedFd) -> str | None:
    for prefix in (TRUSTED, USER):
        attribute = XattrNames(prefix).opaque
        try:
            os.setxattr(directory.fd, attribute, whiteout.OPAQUE)
            os.removexattr(directory.fd, attribute)
            return attribute
        except OSError:
            continue
    return None


def _touch(directory: OwnedFd, name: bytes) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory.fd))
