"""Random lower layers for the model tests, and the plain directory that shows what they must be like merged.

A layer is a tuple of `Item`s, laid out by `build`. `flatten` merges layers on disk by the rules of the
OCI and overlay documents, layer by layer, in the slowest and plainest way: it is the oracle, so it
shares no code with layerfs.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass

OPAQUE = "trusted.overlay.opaque"
WHITEOUT = "trusted.overlay.whiteout"
OWN = "trusted.overlay."

# Long ago, with odd nanoseconds; each layer and item gets its own, so that one of the wrong layer shows.
OLD_NS = 946_684_800_123_456_789


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL as the kernel's xattr carries it, from (tag, permissions, id) in the kernel's order."""
    packed = [struct.pack("<HHI", tag, perm, who & 0xFFFFFFFF) for tag, perm, who in entries]
    return struct.pack("<I", 2) + b"".join(packed)


ACL_ACCESS = "system.posix_acl_access"
ACL_DEFAULT = "system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
ACLS = (
    acl((USER_OBJ, 6, -1), (USER, 4, 1000), (GROUP_OBJ, 4, -1), (MASK, 4, -1), (OTHER, 0, -1)),
    acl(
        *((USER_OBJ, 7, -1), (USER, 7, 1000), (GROUP_OBJ, 5, -1)),
        *((GROUP, 6, 1001), (MASK, 7, -1), (OTHER, 5, -1)),
    ),
    acl((USER_OBJ, 7, -1), (GROUP_OBJ, 5, -1), (OTHER, 1, -1)),  # the same as a mode
)

# mode of directories, mode of others, uid, gid, xattrs (symlinks and special files take no user.* of them)
ATTRS: tuple[tuple[int, int, int, int, dict[str, bytes]], ...] = (
    (0o755, 0o644, 0, 0, {}),
    (0o777, 0o666, 1000, 1000, {}),
    (0o700, 0o600, 0, 0, {"user.a": b"1"}),
    (0o2775, 0o664, 1000, 1001, {"trusted.t": b"\0\xff"}),
    (0o1777, 0o444, 0, 1000, {"user.a": b"", "user.b": b"b" * 200}),
    (0o755, 0o755, 1000, 1000, {"security.s": b"s"}),
    (0o750, 0o640, 1000, 0, {ACL_ACCESS: ACLS[0]}),
    (0o777, 0o777, 0, 0, {ACL_DEFAULT: ACLS[1], "trusted.t": b"t"}),
    (0o000, 0o000, 1000, 1000, {}),
)

# (holes before, data length) runs; the last may be a hole only
CONTENTS: tuple[tuple[tuple[int, int], ...], ...] = (
    (),
    ((0, 1),),
    ((0, 100),),
    ((0, 4096),),
    ((0, 10_000),),
    ((0, 70_000),),
    ((65_536, 4096),),
    ((0, 4096), (131_072, 10), (40_000, 0)),
)

# Few names, so that operations meet what layers and other operations made.
NAMES = ("d1", "d2", "f1", "f2", "f3")
TARGETS = ("f1", "d1", "../f1", "d2/f2", "../d2", "missing", "f2", "/missing/x")


def pattern(size: int, seed: int) -> bytes:
    """`size` bytes that tell where they come from."""
    block = bytes((seed * 31 + i * 7 + i // 251) % 251 + 1 for i in range(min(size, 1009)))
    return (block * (size // 1009 + 1))[:size] if size else b""


@dataclass(frozen=True)
class Item:
    """One object of a layer. What a field means hangs on `kind`; a path taken in its layer is left alone.

    dir: `opaque` in the form `form`. whiteout: `form`. link: one more name of `to`. symlink: to `to`.
    """

    path: str
    kind: str  # dir file symlink fifo char socket link whiteout
    attr: int = 0  # index into ATTRS
    data: int = 0  # index into CONTENTS
    to: str = ""
    opaque: bool = False
    form: str = "kernel"  # whiteout: kernel (char 0/0), wh (.wh.NAME), xattr; opaque directory: kernel, wh

    def __repr__(self) -> str:
        parts = [repr(self.path), repr(self.kind)]
        for name, default in (("attr", 0), ("data", 0), ("to", ""), ("opaque", False), ("form", "kernel")):
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value!r}")
        return f"Item({', '.join(parts)})"


Layer = tuple[Item, ...]

# Dialects, each holding the one before:
#   kernel  only what kernel overlayfs itself leaves behind
#   xattr   whiteouts that are xattrs: the kernel reads them, but cannot rmdir a directory that holds one
#   oci     `.wh.` files, which the kernel takes for files


def build(layer: Layer, root: str, number: int) -> None:
    """Lay `layer` out in the directory `root`. `number` makes its times and contents its own.

    A missing parent becomes a plain directory; an item below something that is no directory is dropped.
    """
    touched: dict[str, int] = {}
    for order, item in enumerate(layer):
        _build_one(item, root, number * 100 + order, touched)
    for path in sorted(touched, key=len, reverse=True):
        os.utime(os.path.join(root, path), ns=(OLD_NS, touched[path]))


def _build_one(item: Item, root: str, salt: int, touched: dict[str, int]) -> None:
    full = os.path.join(root, item.path)
    parent = os.path.dirname(item.path)
    try:
        parts = parent.split("/") if parent else []
        for i in range(len(parts)):
            up = "/".join(parts[: i + 1])
            if not os.path.lexists(os.path.join(root, up)):
                os.mkdir(os.path.join(root, up), 0o755)
                touched[up] = OLD_NS + salt
            elif not stat.S_ISDIR(os.lstat(os.path.join(root, up)).st_mode):
                return
    except OSError:
        return
    hidden = os.path.join(root, parent, ".wh." + os.path.basename(item.path))
    if os.path.lexists(full) or os.path.lexists(hidden):
        return
    mode_dir, mode, uid, gid, xattrs = ATTRS[item.attr]
    if item.kind == "dir":
        os.mkdir(full)
        touched[item.path] = OLD_NS + salt
        if item.opaque and item.form == "wh":
            os.close(os.open(os.path.join(full, ".wh..wh..opq"), os.O_CREAT | os.O_WRONLY, 0o644))
        elif item.opaque:
            os.setxattr(full, OPAQUE, b"y")
    elif item.kind == "file":
        with open(full, "xb") as f:
            at = 0
            for index, (hole, length) in enumerate(CONTENTS[item.data]):
                f.seek(at + hole)
                f.write(pattern(length, salt + index))
                at += hole + length
            f.truncate(at)
    elif item.kind == "symlink":
        os.symlink(item.to, full)
    elif item.kind == "fifo":
        os.mkfifo(full)
    elif item.kind == "char":
        os.mknod(full, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    elif item.kind == "socket":
        _bind(full)
    elif item.kind == "link":
        source = os.path.join(root, item.to)
        try:
            st_ = os.lstat(source)
        except OSError:
            return
        if stat.S_ISDIR(st_.st_mode) or _is_whiteout(source, st_):
            return
        os.link(source, full, follow_symlinks=False)
        return
    elif item.kind == "whiteout":
        if item.form == "wh":
            os.close(os.open(hidden, os.O_CREAT | os.O_WRONLY, 0o644))
        elif item.form == "xattr" and opaque_mark(os.path.dirname(full)) in (b"", b"x"):
            os.close(os.open(full, os.O_CREAT | os.O_WRONLY, 0o644))
            os.setxattr(full, WHITEOUT, b"")
            os.setxattr(os.path.dirname(full), OPAQUE, b"x")
        else:
            os.mknod(full, stat.S_IFCHR, 0)
        return
    os.chown(full, uid, gid, follow_symlinks=False)
    if item.kind != "symlink":
        os.chmod(full, mode_dir if item.kind == "dir" else mode)
    for name, value in xattrs.items():
        if name == ACL_DEFAULT and item.kind != "dir":
            continue
        if item.kind not in ("dir", "file") and not name.startswith(("trusted.", "security.")):
            continue
        os.setxattr(full, name, value, follow_symlinks=False)
    if item.kind != "dir":
        os.utime(full, ns=(OLD_NS, OLD_NS + salt), follow_symlinks=False)


def _bind(path: str) -> None:
    # bind() takes 107 bytes at most, so by way of /proc
    dirfd = os.open(os.path.dirname(path), os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"/proc/self/fd/{dirfd}/{os.path.basename(path)}")
    finally:
        os.close(dirfd)


def opaque_mark(path: str) -> bytes:
    try:
        return os.getxattr(path, OPAQUE, follow_symlinks=False)
    except OSError:
        return b""


def _is_whiteout(path: str, st_: os.stat_result) -> bool:
    if stat.S_ISCHR(st_.st_mode):
        return st_.st_rdev == 0
    if stat.S_ISREG(st_.st_mode) and st_.st_size == 0:
        return os.path.basename(path).startswith(".wh.") or WHITEOUT in os.listxattr(path)
    return False


def clone(src: str, dst: str) -> None:
    """A new object at `dst` like the one at `src`, without overlay's xattrs, without a directory's
    entries.
    """
    st_ = os.lstat(src)
    if stat.S_ISDIR(st_.st_mode):
        os.mkdir(dst)
    elif stat.S_ISREG(st_.st_mode):
        with open(src, "rb") as f, open(dst, "xb") as g:
            at = 0
            while at < st_.st_size:
                try:
                    at = os.lseek(f.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(f.fileno(), at, os.SEEK_HOLE)
                os.pwrite(g.fileno(), os.pread(f.fileno(), end - at, at), at)
                at = end
            os.ftruncate(g.fileno(), st_.st_size)
    elif stat.S_ISLNK(st_.st_mode):
        os.symlink(os.readlink(src), dst)
    elif stat.S_ISSOCK(st_.st_mode):
        _bind(dst)
    else:
        os.mknod(dst, st_.st_mode, st_.st_rdev)
    clone_attributes(src, dst)


def clone_attributes(src: str, dst: str) -> None:
    st_ = os.lstat(src)
    os.chown(dst, st_.st_uid, st_.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(st_.st_mode):
        os.chmod(dst, stat.S_IMODE(st_.st_mode))
    for name in os.listxattr(dst, follow_symlinks=False):
        os.removexattr(dst, name, follow_symlinks=False)
    for name in os.listxattr(src, follow_symlinks=False):
        if not name.startswith(OWN):
            os.setxattr(dst, name, os.getxattr(src, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(dst, ns=(st_.st_atime_ns, st_.st_mtime_ns), follow_symlinks=False)


class Merge:
    """Merges `lowers` (top first) into the directory `dest`; see `flatten`."""

    def __init__(self, lowers: Sequence[str], dest: str) -> None:
        self.lowers, self.dest = lowers, dest
        self.idle: list[str] = []  # whiteouts in directories that nothing is merged with
        self.home: dict[str, int] = {}  # visible non-directories -> the layer they are from
        self.times: dict[str, int] = {}  # visible directories -> mtime

    def run(self) -> None:
        for index in reversed(range(len(self.lowers))):
            self.copied: dict[int, str] = {}  # inode of this layer -> name in dest
            self._apply(index, "", index < len(self.lowers) - 1)
        for path in sorted(self.times, key=len, reverse=True):
            os.utime(os.path.join(self.dest, path), ns=(OLD_NS, self.times[path]))

    def _remove(self, rel: str) -> None:
        full = os.path.join(self.dest, rel)
        if os.path.islink(full) or not os.path.isdir(full):
            if os.path.lexists(full):
                os.unlink(full)
        else:
            shutil.rmtree(full)
        inside = rel + "/" if rel else ""
        for known in (self.home, self.times):
            for path in [p for p in known if p == rel or p.startswith(inside)]:
                known.pop(path)

    def _apply(self, index: int, rel: str, merged: bool) -> None:
        root = self.lowers[index]
        here = os.path.join(root, rel)
        names = sorted(os.listdir(here))
        marked_x = opaque_mark(here) == b"x"
        plain: list[str] = []
        for name in names:
            full = os.path.join(here, name)
            st_ = os.lstat(full)
            child = os.path.join(rel, name)
            if name == ".wh..wh..opq":
                continue  # dealt with where the directory itself was
            if name.startswith(".wh."):
                self._remove(os.path.join(rel, name[4:]))
            elif _is_whiteout(full, st_) and (stat.S_ISCHR(st_.st_mode) or marked_x):
                self._remove(child)
                if not merged:
                    self.idle.append(full)
            else:
                plain.append(name)
        for name in plain:
            full, child = os.path.join(here, name), os.path.join(rel, name)
            dest = os.path.join(self.dest, child)
            st_ = os.lstat(full)
            if stat.S_ISDIR(st_.st_mode):
                opaque = opaque_mark(full) == b"y" or os.path.lexists(os.path.join(full, ".wh..wh..opq"))
                fresh = opaque or os.path.islink(dest) or not os.path.isdir(dest)
                if fresh:
                    self._remove(child)
                    clone(full, dest)
                else:
                    clone_attributes(full, dest)
                self.times[child] = st_.st_mtime_ns
                self._apply(index, child, merged and not fresh)
            else:
                self._remove(child)
                if st_.st_ino in self.copied:
                    os.link(os.path.join(self.dest, self.copied[st_.st_ino]), dest, follow_symlinks=False)
                else:
                    clone(full, dest)
                    self.copied[st_.st_ino] = child
                self.home[child] = index

    def break_hidden_links(self) -> None:
        """Make names of lowers that the merged tree does not show objects of their own.

        Otherwise st_nlink of what is shown counts names that are not there: so it does under kernel
        overlayfs, and no overlay could know better without walking every layer.
        """
        for index, root in enumerate(self.lowers):
            for here, dirs, files in os.walk(root):
                for name in dirs + files:
                    full = os.path.join(here, name)
                    st_ = os.lstat(full)
                    if stat.S_ISDIR(st_.st_mode) or st_.st_nlink == 1:
                        continue
                    if self.home.get(os.path.relpath(full, root)) == index:
                        continue
                    before = os.lstat(here)
                    clone(full, full + ".tmp")
                    os.rename(full + ".tmp", full)
                    os.utime(here, ns=(before.st_atime_ns, before.st_mtime_ns))

    def drop_idle_whiteouts(self, for_kernel: bool) -> None:
        """Kernel overlayfs lists a whiteout in a directory that it does not merge, and then cannot stat it;
        xattrs it does not even look for there, so a whiteout of that form is a file, and not for us to blame.
        """
        for path in self.idle:
            if not for_kernel and stat.S_ISCHR(os.lstat(path).st_mode):
                continue
            here = os.path.dirname(path)
            before = os.lstat(here)
            os.unlink(path)
            os.utime(here, ns=(before.st_atime_ns, before.st_mtime_ns))


def flatten(lowers: Sequence[str], dest: str, *, for_kernel: bool) -> None:
    """Make the empty directory `dest` show `lowers` (top first) merged.

    May unshare hidden hard links in the lowers, and `for_kernel` drop whiteouts that kernel overlayfs
    would list.
    """
    merge = Merge(lowers, dest)
    merge.run()
    merge.break_hidden_links()
    merge.drop_idle_whiteouts(for_kernel)


def turn_marks_over(root: str) -> None:
    """Make overlay's trusted xattrs below `root` the ones for mounts with `userxattr`."""
    for here, _, files in os.walk(root):
        for path in (here, *(os.path.join(here, name) for name in files)):
            for name in os.listxattr(path, follow_symlinks=False):
                if name.startswith(OWN):
                    os.setxattr(path, "user." + name.removeprefix("trusted."), os.getxattr(path, name))
                    os.removexattr(path, name)
