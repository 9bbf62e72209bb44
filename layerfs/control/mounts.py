"""What a live mount says of itself, and the layers that a command is to work on. Changes nothing.

A mounted layerfs answers getxattr on its root for virtual names, to root and to the mount's owner:

    layerfs.mount     JSON: pid, version, upper and work (or null), lowers (a number), volatile, xattr_prefix
    layerfs.lower.N   path of lower N, counted from the top
    layerfs.stat      JSON: what it counts (`statistics`)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerfs.errors import MountError, UsageError
from layerfs.fdutil import at_path, syncfs
from layerfs.overlay.names import TRUSTED, USER, LateNames, XattrNames
from layerfs.stack import Stack

INFO_ATTRIBUTE = "layerfs.mount"
LOWER_ATTRIBUTE = "layerfs.lower.%d"
STATISTICS_ATTRIBUTE = "layerfs.stat"
_CLOSED = "was mounted by somebody else: only they may ask, and root where it has allow_other"
_DEAD = "is a dead mount: its daemon has gone; umount clears it, --upper and --lower read its layers"


@dataclass(frozen=True, slots=True)
class MountInfo:
    """A live mount. Paths are absolute, undecodable bytes as surrogate escapes."""

    pid: int
    version: str
    #: top first
    lowers: tuple[str, ...]
    upper: str | None
    work: str | None
    volatile: bool
    #: `trusted.overlay.` or `user.overlay.`; None when the mount does not tell
    prefix: str | None


def describe(mountpoint: str) -> MountInfo:
    """What the mount on `mountpoint` says of itself. Raises MountError when it is no layerfs, dead, or not
    ours to ask."""
    with _decoding(mountpoint):
        said = json.loads(told(mountpoint, INFO_ATTRIBUTE))
        count = int(said["lowers"])
        lowers = tuple(os.fsdecode(told(mountpoint, LOWER_ATTRIBUTE % number)) for number in range(count))
        return MountInfo(
            int(said["pid"]),
            str(said.get("version", "")),
            lowers,
            said.get("upper"),
            said.get("work"),
            bool(said.get("volatile")),
            said.get("xattr_prefix"),
        )


def work_directory(mountpoint: str) -> str | None:
    """That of a live mount; None when it has none. Raises MountError as `describe` does."""
    with _decoding(mountpoint):
        work = json.loads(told(mountpoint, INFO_ATTRIBUTE))["work"]
        return None if work is None else str(work)


def told(mountpoint: str, attribute: str) -> bytes:
    """A virtual xattr of the mount on `mountpoint`. Raises MountError as `describe` does."""
    try:
        return os.getxattr(mountpoint, attribute)
    except OSError as error:
        reason = {
            errno.ENODATA: "is not the root of a layerfs mount",
            errno.EOPNOTSUPP: "is not the root of a layerfs mount",
            errno.EPERM: _CLOSED,
            errno.EACCES: _CLOSED,
            errno.ENOTCONN: _DEAD,
            errno.ECONNABORTED: _DEAD,
            errno.ENOENT: "no such directory",
        }.get(error.errno or 0, error.strerror)
        raise MountError(f"{shown(mountpoint)}: {reason}", error.errno) from None


@contextlib.contextmanager
def _decoding(mountpoint: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError):
        raise MountError(
            f"{shown(mountpoint)}: does not answer as a layerfs mount does", errno.EPROTO
        ) from None


def flush(mountpoint: str) -> None:
    """Has the kernel hand a mount's daemon what it still holds back: stores through mappings. Raises
    MountError."""
    _syncfs(mountpoint)


def sync(mountpoint: str, info: MountInfo) -> None:
    """Flushes a mount and brings its upper to the disk, unless it is volatile. Raises MountError.

    syncfs(2) on the mount sends its daemon the pages and nothing more, so the upper is synced here."""
    flush(mountpoint)
    if info.upper is not None and not info.volatile:
        _syncfs(info.upper)


def _syncfs(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syncfs(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise MountError(f"{shown(path)}: cannot be synced: {error.strerror}", error.errno) from None


def open_layers(
    mountpoint: str | None,
    upper: str | None,
    lowers: Sequence[str],
    userxattr: bool | None = None,
    *,
    durable: bool,
    need_upper: bool = True,
) -> Stack:
    """The layers of the mount on `mountpoint` (flushed; synced if `durable`), or those that are named,
    opened. `need_upper`: a mount without an upper will not do.

    `userxattr`: which xattrs the upper's marks are in, None: found out. Raises UsageError when not exactly
    one of the two ways is taken, MountError, LayerError."""
    if mountpoint is not None:
        if upper is not None or lowers:
            raise UsageError("give either MOUNTPOINT or --upper and --lower, not both")
        info = describe(mountpoint)
        if info.upper is None and need_upper:
            raise MountError(
                f"{shown(mountpoint)}: is mounted read-only, without an upper: nothing can have changed"
            )
        if durable:
            sync(mountpoint, info)
        else:
            flush(mountpoint)
        prefix = info.prefix
        if prefix is None:
            prefix = _guess_prefix(os.fsencode(info.upper)) if info.upper is not None else TRUSTED
        stack = Stack(info.lowers, info.upper, XattrNames(prefix))
        _refuse_covered(mountpoint, stack)
        return stack
    if upper is None or not lowers:
        raise UsageError("give MOUNTPOINT, or --upper and at least one --lower")
    if userxattr is None:
        # Takes a walk, and most uppers carry no marks at all: then nobody asks.
        names: XattrNames = LateNames(lambda: _guess_prefix(at_path(opened.fd.fd, b".")))
    else:
        names = XattrNames(USER if userxattr else TRUSTED)
    stack = Stack(lowers, upper, names)
    assert stack.upper is not None
    opened = stack.upper
    return stack


def _guess_prefix(upper: bytes) -> str:
    """Under which prefix the marks of an unmounted upper are: that of the first one found.

    Only root of the initial user namespace can set or see `trusted.`; it takes that where there is no mark at
    all."""
    if os.geteuid() != 0:
        return USER
    todo = [upper]
    while todo:
        directory = todo.pop()
        try:
            if (found := _mark(directory)) is not None:
                return found
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    elif entry.is_file(follow_symlinks=False) and (found := _mark(entry.path)) is not None:
                        return found
        except OSError:
            continue  # whoever reads the layer will say so
    return TRUSTED


def _mark(path: bytes) -> str | None:
    """The prefix of an overlay mark on `path`. A user's own attribute, which is stored escaped, is none."""
    for name in os.listxattr(path, follow_symlinks=False):
        for prefix in (TRUSTED, USER):
            if name.startswith(prefix) and not name.startswith(prefix + "overlay."):
                return prefix
    return None


def _refuse_covered(mountpoint: str, stack: Stack) -> None:
    """A mount may lie on one of its own layers; by its path we would then see the merged tree and not the
    layer."""
    device = os.stat(mountpoint).st_dev
    for layer in stack.layers:
        if os.fstat(layer.fd.fd).st_dev == device:
            where = shown(layer.path)
            raise MountError(
                f"{where}: is covered by the mount itself; unmount it and use --upper and --lower"
            )


def shown(path: str) -> str:
    """For a message of one line."""
    return path if path.isprintable() else repr(path)
