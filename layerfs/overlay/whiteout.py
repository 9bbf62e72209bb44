"""Whiteouts and opaque marks: their forms on disk. Finding them in a directory is `stack.merge`, writing them
is `upper.upper`.
"""

from __future__ import annotations

import os
import stat
from typing import Final

#: OCI and AUFS form (image-spec layer.md "Whiteouts"): an empty regular file of this prefix hides the name in
#: the layers below.
PREFIX: Final = b".wh."
#: Hides everything the layers below have in this directory.
OPAQUE_NAME: Final = b".wh..wh..opq"

#: Value of the opaque xattr: a directory that hides the layers below …
OPAQUE: Final = b"y"
#: … or one that is not opaque but may hold whiteouts in xattr form (overlayfs.rst, "Nesting overlayfs
#: mounts").
XWHITEOUTS: Final = b"x"


def is_whiteout_device(st: os.stat_result) -> bool:
    """Character device 0/0: the kernel's form."""
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def hidden_name(name: bytes) -> bytes | None:
    """The name that the file `name` hides when it is an OCI whiteout; None when it is none (the opaque mark
    and a bare `.wh.` are none).
    """
    if not name.startswith(PREFIX) or name == OPAQUE_NAME or len(name) == len(PREFIX):
        return None
    return name[len(PREFIX) :]
