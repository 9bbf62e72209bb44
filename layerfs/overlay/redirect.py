"""The redirect xattr: where in the layers below the content of a renamed directory (or metadata-only file)
lies.

Source: overlayfs.rst, "redirect_dir"; fs/overlayfs/namei.c ovl_check_redirect, util.c ovl_get_redirect_xattr.
"""

from __future__ import annotations

import errno
import os
from typing import Final

#: Longest value we follow: PATH_MAX, as a path through the kernel could not be longer.
MAX_LENGTH: Final = 4096


def decode(value: bytes) -> bytes:
    """Checks a stored redirect and returns it: `/a/b`, absolute from the overlay's root, or one plain name, a
    sibling.

    Raises OSError(EIO) for anything else (empty, `..`, `.`, double or trailing slashes, NUL, too long): a
    layer's author may write what he likes here, and the kernel answers such values with an error too."""
    value = value.rstrip(b"\0") if value.endswith(b"\0") else value
    parts = value[1:].split(b"/") if value.startswith(b"/") else [value]
    if (
        len(value) > MAX_LENGTH
        or b"\0" in value
        or (not value.startswith(b"/") and b"/" in value)
        or any(part in (b"", b".", b"..") or len(part) > 255 for part in parts)
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "overlay.redirect")
    return value


def encode(path: bytes) -> bytes:
    """The absolute form for `path`, which is relative to the overlay's root and plain (`a/b`)."""
    return b"/" + path
