"""Reading mountinfo: escapes, odd lines, and overlay options with commas in them."""

from __future__ import annotations

import os

from layerfs.fdutil.mountinfo import parse_mountinfo, read_mountinfo, unescape_octal

LINES = (
    rb"43 27 0:41 / /mnt/a\040b\134c\012d rw,noatime shared:1 master:2 - fuse.layerfs src\040x rw,user_id=0"
    b"\n"
    rb"44 43 8:1 /sub /m rw - overlay overlay rw,lowerdir=/a:/b,upperdir=/u\054\040x,workdir=/w"
    b"\n"
    b"nonsense\n"
    b"1 2 3\n"
)


def test_fields() -> None:
    first, second = parse_mountinfo(LINES)
    assert first.target == b"/mnt/a b\\c\nd" and first.fstype == b"fuse.layerfs" and first.source == b"src x"
    assert (first.device, first.mount_id, first.parent_id) == (os.makedev(0, 41), 43, 27)
    assert second.super_option(b"upperdir") == b"/u, x" and second.super_option(b"workdir") == b"/w"
    assert second.super_option(b"rw") is None and second.super_option(b"nothing") is None


def test_octal() -> None:
    assert unescape_octal(rb"\134040") == rb"\040"


def test_own_mounts_are_read() -> None:
    assert any(entry.target == b"/" for entry in read_mountinfo())
