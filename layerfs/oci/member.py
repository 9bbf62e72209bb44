"""One entry of a layer tarball as a plain value, and the rules for its names. Reads no file and writes none.

Source: OCI image-spec layer.md; POSIX pax.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from layerfs.errors import TarError, UsageError
from layerfs.overlay import whiteout

#: Longest path the kernel takes in one call (PATH_MAX without its NUL), and longest single name (NAME_MAX).
MAX_PATH = 4095
MAX_NAME = 255


class Kind(enum.Enum):
    """Type of a member; the value is its typeflag in the tar header."""

    FILE = b"0"
    HARDLINK = b"1"
    SYMLINK = b"2"
    CHAR = b"3"
    BLOCK = b"4"
    DIR = b"5"
    FIFO = b"6"


# Not frozen: that made making one five times as slow (1.3 against 0.25 µs), and a layer has many.
@dataclass(slots=True)
class Member:
    """An entry of a layer. Never changed: others may hold it.

    `name` is relative to the layer's root and plain (`a/b`: no `.`, `..`, leading or trailing slash); b"" is
    the root itself. `target` is where a symlink points (any bytes) or which earlier name a hard link joins
    (plain, like `name`). `mode` holds the twelve permission bits only, `size` is 0 for all but files. Names
    of xattrs are `str` as `os.listxattr` gives them."""

    name: bytes
    kind: Kind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    target: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


#: xattrs that the machine puts on every file, and ACLs that only a server can interpret: they are of this
#: place, not of the image.
OF_THIS_MACHINE = ("security.selinux", "security.ima", "security.evm", "system.nfs4_acl")
_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIR,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
}


def member_of(path: bytes, st: os.stat_result, xattrs: Mapping[str, bytes], target: bytes = b"") -> Member:
    """An object, no socket, as a member under the name `path`; `target`: where a symbolic link points."""
    mode = st.st_mode
    kind = _KINDS[stat.S_IFMT(mode)]
    return Member(
        path,
        kind,
        mode & 0o7777,
        st.st_uid,
        st.st_gid,
        st.st_mtime_ns,
        st.st_size if kind is Kind.FILE else 0,
        target,
        (os.major(st.st_rdev), os.minor(st.st_rdev)) if kind is Kind.CHAR or kind is Kind.BLOCK else (0, 0),
        xattrs,
    )


def display(name: bytes) -> str:
    """`name` for a message or a listing: one line that stands for nothing else. Bytes that are no UTF-8 and
    ASCII controls are `\\xNN`, other unprintable characters `\\uNNNN`, a backslash is doubled."""
    text = os.fsdecode(name)
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_display_char(char) for char in text)


def _display_char(char: str) -> str:
    code = ord(char)
    if char == "\\" or char in "\n\t\r":
        return {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}[char]
    if char.isprintable():
        return char
    if code < 0x80 or 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def split(path: bytes) -> tuple[bytes, bytes]:
    """(directory, last name) of a plain path; (b"", b"") for the root."""
    directory, _, name = path.rpartition(b"/")
    return directory, name


def plain_path(raw: bytes, what: str = "member") -> bytes:
    """The plain form of a name as a tar holds it (`./a//b/` and `/a/b` are `a/b`; `.` and `/` are the root).

    A name that begins with a slash counts from the root of the layer, as GNU tar, docker, containerd, podman
    and umoci have it. Raises TarError for a name that has a `..`, is empty, holds a NUL or is longer than a
    path may be: nothing that would have to be interpreted is let in (DESIGN 6, "no name, link or whiteout may
    reach outside the layer")."""
    if not raw:
        raise TarError(f"a {what} has no name")
    name = raw[2:] if raw.startswith(b"./") else raw
    if (
        0 < len(name) <= MAX_NAME
        and not name.startswith((b"/", b"."))
        and not name.endswith(b"/")
        and name.find(b"/.") < 0  # `in` takes four times as long: it asks first whether that is a number
        and name.find(b"//") < 0
        and name.find(b"\0") < 0
    ):
        return name  # most of them
    if b"\0" in raw:
        raise TarError(f"{what} {display(raw)}: its name holds a NUL")
    parts = [part for part in raw.split(b"/") if part and part != b"."]
    if b".." in parts:
        raise TarError(f"{what} {display(raw)}: its name has a '..'")
    path = b"/".join(parts)
    # The longest name there is can have a whiteout, which no file system could hold but a tar can.
    if len(path) > MAX_NAME and (
        len(path) > MAX_PATH or any(len(part.removeprefix(whiteout.PREFIX)) > MAX_NAME for part in parts)
    ):
        raise TarError(f"{what} {display(path[:60])}...: its name is too long")
    return path


class Mark(enum.Enum):
    """What a name in a layer tarball stands for (image-spec layer.md, "Whiteouts")."""

    ENTRY = enum.auto()
    WHITEOUT = enum.auto()
    OPAQUE = enum.auto()
    #: Book-keeping of AUFS (`.wh..wh.plnk`, `.wh..wh.orph`, …): neither an entry nor a whiteout.
    AUFS = enum.auto()


def is_aufs(name: bytes) -> bool:
    """Whether a single name is one of AUFS's own: all is passed over that has it, or lies below it."""
    return name.startswith(2 * whiteout.PREFIX) and name != whiteout.OPAQUE_NAME


def classify(name: bytes) -> tuple[Mark, bytes]:
    """What the last component `name` of a member is, and the name that it hides when it is a whiteout.

    Raises TarError for a bare `.wh.` and for whiteouts of `.` and `..`."""
    if not name.startswith(whiteout.PREFIX):
        return Mark.ENTRY, name
    if name == whiteout.OPAQUE_NAME:
        return Mark.OPAQUE, b""
    if is_aufs(name):
        return Mark.AUFS, name
    hidden = name[len(whiteout.PREFIX) :]
    if hidden in (b"", b".", b".."):
        raise TarError(f"member {display(name)}: a whiteout of nothing that can be named")
    return Mark.WHITEOUT, hidden


def made_up_time() -> int:
    """Seconds since the epoch for a time that no file has (a whiteout's): `SOURCE_DATE_EPOCH`, else 0, so
    that bytes do not depend on the day.

    Source: https://reproducible-builds.org/specs/source-date-epoch/. Raises UsageError when it is no
    number."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise UsageError(f"SOURCE_DATE_EPOCH={text!r} is not a number of seconds: unset it or give one")
    return int(text)
