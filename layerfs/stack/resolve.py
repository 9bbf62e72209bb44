"""Which lower directories make up a directory, and where the data of a metadata-only file lie: opaque marks
and redirects.

Mirrors ovl_lookup() (fs/overlayfs/namei.c) layer by layer. A redirect only ever leads *down*, to layers below
the one that holds it, so there can be no loop; it is walked one component at a time from a layer's root, so
it cannot leave the layer.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerfs.fdutil import OwnedFd, at_path, lgetxattr
from layerfs.overlay import redirect, whiteout
from layerfs.overlay.names import FOREIGN_OPAQUE, XattrNames, has_marks
from layerfs.stack.layer import LowerDir, Stack


@dataclass(frozen=True, slots=True)
class Marks:
    """What a directory or file in a layer says about the layers below it."""

    opaque: bool = False
    redirect: bytes | None = None
    metacopy: bool = False


_NO_MARKS = Marks()


def read_marks(parent: int, name: bytes, names: XattrNames, *, lower: bool) -> Marks:
    """Reads the marks of `name` in the directory `parent`. One system call for the many that have none.

    In a lower layer (`lower`) every form of opaque mark counts, in the upper only ours. Raises OSError(EIO)
    for a nonsense redirect."""
    try:
        present = os.listxattr(at_path(parent, name), follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENODATA):
            return _NO_MARKS
        raise
    if not has_marks(present):
        return _NO_MARKS
    opaque_names: tuple[str, ...] = FOREIGN_OPAQUE if lower else (names.opaque,)
    opaque = any(
        attribute in present and lgetxattr(parent, name, attribute) == whiteout.OPAQUE
        for attribute in opaque_names
    )
    target = None
    if names.redirect in present:
        target = redirect.decode(lgetxattr(parent, name, names.redirect))
    return Marks(opaque, target, names.metacopy in present)


def own_redirect(path: bytes, names: XattrNames, *, follow: bool) -> bytes | None:
    """The redirect on one object, None when it has none. Raises OSError(EIO) for nonsense."""
    try:
        value = os.getxattr(path, names.redirect, follow_symlinks=follow)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise
    return redirect.decode(value)


def lower_directories(
    stack: Stack,
    parent_lowers: Sequence[LowerDir],
    name: bytes,
    holders: Sequence[LowerDir],
    upper_parent: OwnedFd | None,
) -> tuple[LowerDir, ...]:
    """The lower directories that make up the directory `name`, top first.

    `parent_lowers` are its parent's; `holders` those of them that hold a directory of that name
    (`Entry.lowers`); `upper_parent` is the parent's upper directory when `name` is in the upper. Raises
    OSError(EIO) for a nonsense redirect."""
    found: list[LowerDir] = []
    target: bytes | None = None
    below = -1
    if upper_parent is not None:
        marks = read_marks(upper_parent.fd, name, stack.names, lower=False)
        if marks.opaque or (holders and _has_opaque_file(upper_parent.fd, name)):
            return ()  # opaque wins over a redirect (ovl_lookup_single)
        target = marks.redirect
    if target is None:
        bottom = len(stack.lowers) - 1
        for holder in holders:
            found.append(holder.child(name))
            if holder.layer.index == bottom:
                return tuple(found)
            fd = stack.open(holder)
            marks = read_marks(fd.fd, name, stack.names, lower=True)
            if marks.opaque or (holder is not holders[-1] and _has_opaque_file(fd.fd, name)):
                return tuple(found)
            if marks.redirect is not None:
                target, below = marks.redirect, holder.layer.index
                break
    while target is not None:
        target, below = _follow(stack, parent_lowers, target, below, found)
    return tuple(found)


def _follow(
    stack: Stack, parent_lowers: Sequence[LowerDir], target: bytes, below: int, found: list[LowerDir]
) -> tuple[bytes | None, int]:
    """Appends to `found` the directories that the redirect `target` names in layers after `below`.

    Returns the next redirect to follow and the layer that held it, or (None, …) at the end."""
    for start, path in _starts(stack, parent_lowers, target, below):
        step = _walk(stack, start, path)
        if step is None:
            continue
        if step.directory is not None:
            found.append(step.directory)
        if step.redirect is not None and not step.stop:
            return step.redirect, start.layer.index
        if step.stop:
            break
    return None, below


def _starts(
    stack: Stack, parent_lowers: Sequence[LowerDir], target: bytes, below: int
) -> Iterable[tuple[LowerDir, list[bytes]]]:
    if target.startswith(b"/"):
        path = target[1:].split(b"/")
        return ((layer.root, path) for layer in stack.lowers if layer.index > below)
    return ((home, [target]) for home in parent_lowers if home.layer.index > below)


@dataclass(slots=True)
class _Step:
    """Where a path leads in one layer."""

    directory: LowerDir | None  # the directory found
    parent: LowerDir  # where the last component was looked up
    is_file: bool = False
    metacopy: bool = False
    stop: bool = False  # layers below do not count any more
    redirect: bytes | None = None  # layers below are asked for this instead


def _walk(stack: Stack, start: LowerDir, path: Sequence[bytes]) -> _Step | None:
    """Walks `path` from `start` within one layer, marks of every component heeded; None when the layer says
    nothing of it.
    """
    here = start
    stop = False
    # What layers below are asked for: the same path, unless a component on the way was moved (even when the
    # end is not found here).
    below = start.path.split(b"/") if start.path else []
    moved = False

    def result(directory: LowerDir | None, rest: Sequence[bytes], *, end: bool = False) -> _Step:
        redirected = b"".join(b"/" + part for part in (*below, *rest)) if moved else None
        return _Step(directory, here, stop=stop or end, redirect=redirected)

    for position, name in enumerate(path):
        rest = path[position + 1 :]
        fd = stack.open(here)
        try:
            st = os.stat(name, dir_fd=fd.fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            if _oci_whiteout(stack, here, name):
                return result(None, (), end=True)
            return result(None, (name, *rest)) if stop or moved else None
        if not stat.S_ISDIR(st.st_mode):
            step = result(None, (name, *rest), end=True)
            step.is_file = not rest and stat.S_ISREG(st.st_mode)
            if step.is_file:
                marks = read_marks(fd.fd, name, stack.names, lower=True)
                step.metacopy = marks.metacopy
                step.redirect = marks.redirect if marks.redirect is not None else step.redirect
            return step
        marks = read_marks(fd.fd, name, stack.names, lower=True)
        stop = stop or marks.opaque or _has_opaque_file(fd.fd, name)
        below.append(name)
        if marks.redirect is not None:
            moved = True
            if marks.redirect.startswith(b"/"):
                below = marks.redirect[1:].split(b"/")
            else:
                below[-1] = marks.redirect
        here = here.child(name)
    return result(here, ())


def _oci_whiteout(stack: Stack, home: LowerDir, name: bytes) -> bool:
    try:
        os.stat(whiteout.PREFIX + name, dir_fd=stack.open(home).fd, follow_symlinks=False)
    except OSError:
        return False
    return True


def _has_opaque_file(parent: int, name: bytes) -> bool:
    try:
        os.stat(name + b"/" + whiteout.OPAQUE_NAME, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return False
    return True


def data_source(
    stack: Stack, parent_lowers: Sequence[LowerDir], name: bytes, target: bytes | None, below: int
) -> tuple[LowerDir, bytes]:
    """Where the data of a metadata-only file lie: (directory, name) of a regular file in a layer after
    `below`.

    `target` is the file's own redirect, if it has one. Raises OSError(EIO) when there is none: the kernel
    answers so too."""
    wanted = target if target is not None else name
    while True:
        again: tuple[bytes, int] | None = None
        for start, path in _starts(stack, parent_lowers, wanted, below):
            step = _walk(stack, start, path)
            if step is None:
                continue
            if step.is_file and not step.metacopy:
                return step.parent, path[-1]
            if step.is_file and step.metacopy:
                again = (step.redirect if step.redirect is not None else wanted, start.layer.index)
                break
            if step.redirect is not None and not step.stop:
                again = (step.redirect, start.layer.index)
            break
        if again is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "metadata-only file without data")
        wanted, below = again
