"""Reads /proc/PID/mountinfo (proc(5)) into values. Never touches the mounts it names, so dead ones are safe
to list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

_OCTAL = re.compile(rb"\\([0-3][0-7][0-7])")


def unescape_octal(text: bytes) -> bytes:
    """Undo the kernel's `\\040` escapes (fs/seq_file.c `mangle_path`, `seq_escape`)."""
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), text) if b"\\" in text else text


@dataclass(frozen=True)
class MountEntry:
    """One line of mountinfo."""

    mount_id: int
    parent_id: int
    #: `os.makedev` number of the file system, as `st_dev` shows it (not on btrfs).
    device: int
    #: The directory of the file system that is mounted, and where, relative to the reader's root.
    root: bytes
    target: bytes
    options: bytes
    fstype: bytes
    source: bytes
    #: Raw: values still carry octal escapes, so that `,` splits options and nothing else.
    super_options: bytes

    def super_option(self, name: bytes) -> bytes | None:
        """Value of `name=` among the file system's own options, unescaped; None when it is not there."""
        for option in self.super_options.split(b","):
            key, equals, value = option.partition(b"=")
            if key == name and equals:
                return unescape_octal(value)
        return None


def parse_mountinfo(text: bytes) -> Iterator[MountEntry]:
    """Entries in the order of the file: a later one on the same target lies on top. Lines of unknown form are
    left out.
    """
    for line in text.splitlines():
        left, separator, right = line.partition(b" - ")
        fields, tail = left.split(b" "), right.split(b" ")
        if not separator or len(fields) < 6 or len(tail) < 3:
            continue
        major, _, minor = fields[2].partition(b":")
        yield MountEntry(
            mount_id=int(fields[0]),
            parent_id=int(fields[1]),
            device=os.makedev(int(major), int(minor)),
            root=unescape_octal(fields[3]),
            target=unescape_octal(fields[4]),
            options=fields[5],
            fstype=unescape_octal(tail[0]),
            source=unescape_octal(tail[1]),
            super_options=tail[2],
        )


def read_mountinfo(pid: int | str = "self") -> list[MountEntry]:
    """All mounts that process `pid` sees. Raises OSError when it is gone or not ours to read."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return list(parse_mountinfo(file.read()))
