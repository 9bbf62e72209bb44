"""What a directory tree looks like to a program: snapshots of it, and when two of them are *equal*.

Equal is defined by the project's design: type, mode, uid, gid, rdev, size (not of directories), mtime in ns,
nlink of non-directories, xattrs, ACLs, link target, content, holes, and which names share an inode. Not
compared: nlink of directories, st_dev, atime, st_blocks, the value of st_ino. `lowers_guard` is stricter: it
asserts that nobody touched a lower layer.

This module reads; it never changes a tree (files are opened with O_NOATIME where that is allowed). It knows
nothing of overlays or mounts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields

import xxhash

__all__ = ["Entry", "Snapshot", "assert_equal", "differences", "lowers_guard", "snapshot"]

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One object under one name. Fields with `compare=False` are for stricter callers, not part of
    *equal*.
    """

    type: str
    mode: int  # permission bits, setuid, setgid and sticky; no type
    uid: int
    gid: int
    rdev: int  # 0 unless a device
    size: int | None  # bytes; None for directories
    mtime_ns: int
    nlink: int | None  # None for directories
    xattrs: tuple[tuple[bytes, bytes], ...]  # sorted; ACLs are among them (system.posix_acl_*)
    target: bytes | None  # symlinks only
    digest: bytes | None  # xxh3-128 of a file's content; None when not a file, or not asked for
    extents: tuple[tuple[int, int], ...] | None  # [start, end) of data, when holes were asked for
    names: frozenset[bytes]  # every name within the snapshot that is this object (directories: just the one)
    ino: int = field(compare=False)
    dev: int = field(compare=False)
    ctime_ns: int = field(compare=False)
    dir_nlink: int = field(compare=False)  # st_nlink of anything


Snapshot = dict[bytes, Entry]


def snapshot(
    path: str | bytes | os.PathLike[str],
    *,
    content: bool = True,
    holes: bool = False,
    follow_root: bool = True,
    exclude: Collection[bytes] = (),
    hide_xattr: Callable[[bytes], bool] | None = None,
) -> Snapshot:
    """Everything under `path`, by its name relative to it in bytes; the root itself is `b"."`.

    `exclude`: relative names left out with all below them. `hide_xattr`: names of xattrs to leave out.
    Crosses mount points. Raises OSError as it comes: a tree that cannot be read is a failure.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow_root else os.O_NOFOLLOW)
    found: dict[bytes, Entry] = {}
    sharing: dict[tuple[int, int], list[bytes]] = {}
    hide = hide_xattr or (lambda name: False)
    root = os.open(path, flags)
    try:
        st = os.fstat(root)
        found[b"."] = _entry(b".", st, _xattrs(root, None, hide), None, None, None)
        _walk(root, b"", found, sharing, set(exclude), content, holes, hide)
    finally:
        os.close(root)
    for names in sharing.values():
        if len(names) > 1:
            shared = frozenset(names)
            for name in names:
                found[name] = _with_names(found[name], shared)
    return found


def _walk(
    dirfd: int,
    prefix: bytes,
    found: dict[bytes, Entry],
    sharing: dict[tuple[int, int], list[bytes]],
    exclude: set[bytes],
    content: bool,
    holes: bool,
    hide: Callable[[bytes], bool],
) -> None:
    for text in sorted(os.listdir(dirfd)):
        name = os.fsencode(text)
        rel = prefix + name
        if rel in exclude:
            continue
        st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        xattrs = _xattrs(dirfd, name, hide)
        target = digest = extents = None
        if stat.S_ISLNK(st.st_mode):
            target = os.readlink(name, dir_fd=dirfd)
        elif stat.S_ISREG(st.st_mode) and (content or holes):
            digest, extents = _read(dirfd, name, st.st_size, content, holes)
        found[rel] = _entry(rel, st, xattrs, target, digest, extents)
        if stat.S_ISDIR(st.st_mode):
            child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)
            try:
                _walk(child, rel + b"/", found, sharing, exclude, content, holes, hide)
            finally:
                os.close(child)
        else:
            sharing.setdefault((st.st_dev, st.st_ino), []).append(rel)


def _entry(
    rel: bytes,
    st: os.stat_result,
    xattrs: tuple[tuple[bytes, bytes], ...],
    target: bytes | None,
    digest: bytes | None,
    extents: tuple[tuple[int, int], ...] | None,
) -> Entry:
    is_dir = stat.S_ISDIR(st.st_mode)
    is_dev = stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode)
    return Entry(
        type=_TYPES[stat.S_IFMT(st.st_mode)],
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        rdev=st.st_rdev if is_dev else 0,
        size=None if is_dir else st.st_size,
        mtime_ns=st.st_mtime_ns,
        nlink=None if is_dir else st.st_nlink,
        xattrs=xattrs,
        target=target,
        digest=digest,
        extents=extents,
        names=frozenset((rel,)),
        ino=st.st_ino,
        dev=st.st_dev,
        ctime_ns=st.st_ctime_ns,
        dir_nlink=st.st_nlink,
    )


def _with_names(entry: Entry, names: frozenset[bytes]) -> Entry:
    values = {f.name: getattr(entry, f.name) for f in fields(Entry)}
    return Entry(**{**values, "names": names})


def _xattrs(dirfd: int, name: bytes | None, hide: Callable[[bytes], bool]) -> tuple[tuple[bytes, bytes], ...]:
    # /proc/self/fd/N/NAME: the xattr calls have no *at form before Linux 6.13.
    where = b"/proc/self/fd/%d" % dirfd if name is None else b"/proc/self/fd/%d/%s" % (dirfd, name)
    follow = name is None
    try:
        listed = os.listxattr(where, follow_symlinks=follow)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return ()
        raise
    pairs = [(os.fsencode(attr), os.getxattr(where, attr, follow_symlinks=follow)) for attr in listed]
    return tuple(sorted((attr, value) for attr, value in pairs if not hide(attr)))


def _read(
    dirfd: int, name: bytes, size: int, content: bool, holes: bool
) -> tuple[bytes | None, tuple[tuple[int, int], ...] | None]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags | os.O_NOATIME, dir_fd=dirfd)
    except PermissionError:
        fd = os.open(name, flags, dir_fd=dirfd)
    try:
        digest = None
        if content:
            hasher = xxhash.xxh3_128()
            while chunk := os.read(fd, 1 << 20):
                hasher.update(chunk)
            digest = hasher.digest()
        return digest, tuple(_extents(fd, size)) if holes else None
    finally:
        os.close(fd)


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at


def differences(
    a: Mapping[bytes, Entry],
    b: Mapping[bytes, Entry],
    *,
    ignore: Collection[str] = (),
    strict: Collection[str] = (),
    recent_ns: int | None = None,
    labels: tuple[str, str] = ("first", "second"),
) -> list[str]:
    """Lines that tell how `b` differs from `a`; none when they are equal.

    `ignore`: fields left out. `strict`: fields compared on top (`ino`, `dev`, `ctime_ns`, `dir_nlink`).
    `recent_ns`: mtimes at or after it count as one and the same "now", for trees on which the same was
    done at slightly different times.
    """
    compared = [f.name for f in fields(Entry) if (f.compare or f.name in strict) and f.name not in ignore]
    lines: list[str] = []
    for name in sorted(a.keys() | b.keys()):
        shown = os.fsdecode(name)
        if name not in b:
            lines.append(f"{shown!r}: only in {labels[0]}: {_brief(a[name])}")
            continue
        if name not in a:
            lines.append(f"{shown!r}: only in {labels[1]}: {_brief(b[name])}")
            continue
        if a[name].type != b[name].type:
            lines.append(f"{shown!r}: {labels[0]}: {_brief(a[name])}; {labels[1]}: {_brief(b[name])}")
            continue
        for what in compared:
            left, right = getattr(a[name], what), getattr(b[name], what)
            if left == right:
                continue
            if what == "mtime_ns" and recent_ns is not None and min(left, right) >= recent_ns:
                continue
            both = f"{labels[0]} {_show(what, left)}, {labels[1]} {_show(what, right)}"
            lines.append(f"{shown!r}: {what}: {both}")
    return lines


def assert_equal(
    a: Mapping[bytes, Entry],
    b: Mapping[bytes, Entry],
    *,
    ignore: Collection[str] = (),
    strict: Collection[str] = (),
    recent_ns: int | None = None,
    labels: tuple[str, str] = ("first", "second"),
    message: str = "trees differ",
) -> None:
    """Raises AssertionError with at most 30 lines of difference. The arguments are those of
    `differences`.
    """
    lines = differences(a, b, ignore=ignore, strict=strict, recent_ns=recent_ns, labels=labels)
    if lines:
        more = [f"... and {len(lines) - 30} more"] if len(lines) > 30 else []
        raise AssertionError("\n  ".join([f"{message}:", *lines[:30], *more]))


def _brief(entry: Entry) -> str:
    extra = "" if entry.target is None else f" -> {os.fsdecode(entry.target)!r}"
    size = "" if entry.size is None else f" size {entry.size}"
    return f"{entry.type} {entry.mode:04o} {entry.uid}:{entry.gid}{size}{extra}"


def _show(what: str, value: object) -> str:
    if what == "mode":
        return f"{value:04o}"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(os.fsdecode(name) for name in value)) + "}"
    if isinstance(value, bytes):
        return value.hex() if what == "digest" else repr(value)
    if what == "xattrs" and isinstance(value, tuple):
        return "{" + ", ".join(f"{os.fsdecode(attr)}={data!r}" for attr, data in value) + "}"
    return str(value)


@contextlib.contextmanager
def lowers_guard(
    paths: Iterable[str | bytes | os.PathLike[str]], *, content: bool = True, ctime: bool = True
) -> Iterator[None]:
    """Asserts on leaving that these trees are byte for byte as they were on entering: all of *equal*, all
    xattrs, inode numbers, nlink of directories, and ctime, so that a change that was undone shows too.
    Only atime may differ.

    `content=False` trusts ctime for the bytes (every write moves it), for trees too big to read twice.
    """
    strict = ["ino", "dev", "dir_nlink"] + (["ctime_ns"] if ctime else [])
    before = {path: snapshot(path, content=content) for path in paths}
    yield
    for path, then in before.items():
        assert_equal(
            then,
            snapshot(path, content=content),
            strict=strict,
            labels=("before", "after"),
            message=f"lower layer {os.fsdecode(path)} was changed",
        )
