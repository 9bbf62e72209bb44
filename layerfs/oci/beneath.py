"""Finding and removing things inside one directory, never outside: what a hostile tar or image names is only
ever reached through here. Knows nothing of layers.

Every way is opened from a directory's own descriptor with openat2 and RESOLVE_INSIDE_MOUNT,
so a symbolic link that a layer planted is never followed; the last component is only ever named in calls that
do not follow. What is mounted inside is no part of it either: a whiteout must not empty somebody's
bind-mounted home.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from layerfs.errors import LayerError, TarError
from layerfs.fdutil import (
    RESOLVE_INSIDE_MOUNT,
    OwnedFd,
    at_path,
    openat2,
)
from layerfs.oci.member import display

#: How a directory is opened that may be a user's own choice: links in its path are his.
ROOT = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: How one inside it is opened.
DIRECTORY = ROOT | os.O_NOFOLLOW
DIRECTORY_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


def open_beneath(directory: int, path: bytes, flags: int) -> OwnedFd:
    """Opens `path` inside `directory`. Raises LayerError at a mount point, OSError (ELOOP for a symbolic
    link)."""
    try:
        return OwnedFd(openat2(directory, path, flags, resolve=RESOLVE_INSIDE_MOUNT))
    except OSError as error:
        if error.errno != errno.EXDEV:  # no name here has a `..`, and no link is followed: it is a mount
            raise
        what = f"{display(path)}: something else is mounted there or above; unmount it first"
        raise LayerError(what, errno.EXDEV) from None


def subdirectory(parent: OwnedFd, name: bytes) -> OwnedFd | None:
    """An O_PATH descriptor of the directory `name`; None where there is none, or something else."""
    try:
        return open_beneath(parent.fd, name, DIRECTORY_PATH)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def is_behind_link(root: OwnedFd, path: bytes) -> bool:
    """Whether a symbolic link is what keeps the directory `path` from being opened."""
    here = root
    for part in path.split(b"/"):
        try:
            here = open_beneath(here.fd, part, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        mode = os.fstat(here.fd).st_mode
        if not stat.S_ISDIR(mode):
            return stat.S_ISLNK(mode)
    return False


def behind_link(what: str) -> TarError:
    return TarError(f"{what} lies behind a symbolic link")


def below_no_directory(what: str) -> TarError:
    return TarError(f"{what} lies below something that is no directory")


def in_the_way(root: OwnedFd, path: bytes, what: str, error: OSError) -> Exception:
    """What to raise for the member `what` when `error` kept the directory `path` from being opened."""
    if error.errno not in (errno.ELOOP, errno.ENOTDIR):
        return error
    # For a symbolic link as the last component, O_DIRECTORY makes it ENOTDIR as well.
    return behind_link(what) if is_behind_link(root, path) else below_no_directory(what)


def names_in(directory: OwnedFd) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(directory.fd)]


def remove(parent: OwnedFd, name: bytes) -> bool:
    """Removes `name` with all below it; False where there is nothing. Raises OSError, LayerError."""
    try:
        os.unlink(name, dir_fd=parent.fd)
    except FileNotFoundError:
        return False
    except (IsADirectoryError, PermissionError):
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent.fd, follow_symlinks=False).st_mode):
            raise
        _remove_tree(parent, name)
    return True


def _remove_tree(parent: OwnedFd, top: bytes) -> None:
    """rm -rf by descriptors, never following a link. Two are open at a time and no stack grows: a tree may be
    as deep as it likes."""
    here = _open_to_remove(parent, top)
    levels: list[tuple[bytes, Iterator[bytes]]] = [(top, iter(names_in(here)))]
    identities = [_identity(parent)]
    while levels:
        name, names = levels[-1]
        child = next(names, None)
        if child is None:
            levels.pop()
            above = OwnedFd(os.open(b"..", DIRECTORY, dir_fd=here.fd)) if levels else parent
            if _identity(above) != identities.pop():
                raise LayerError("somebody moves directories about while a layer is applied; try again alone")
            here = above
            os.rmdir(name, dir_fd=here.fd)
            continue
        try:
            os.unlink(child, dir_fd=here.fd)
        except (IsADirectoryError, PermissionError):
            if not stat.S_ISDIR(os.stat(child, dir_fd=here.fd, follow_symlinks=False).st_mode):
                raise
            identities.append(_identity(here))
            here = _open_to_remove(here, child)
            levels.append((child, iter(names_in(here))))


def _open_to_remove(parent: OwnedFd, name: bytes) -> OwnedFd:
    """An ordinary user's own directory may be one that he may not read."""
    if os.geteuid() != 0:
        with contextlib.suppress(PermissionError):
            os.chmod(at_path(parent.fd, name), 0o700)
    return open_beneath(parent.fd, name, DIRECTORY)


def _identity(fd: OwnedFd) -> tuple[int, int]:
    st = os.fstat(fd.fd)
    return st.st_dev, st.st_ino
