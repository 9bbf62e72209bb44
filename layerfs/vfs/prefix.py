"""Which xattr prefix a mount's marks are under: `trusted.overlay.` or `user.overlay.`. Writes nothing but
probes.
"""

from __future__ import annotations

import os

from layerfs.fdutil import OwnedFd
from layerfs.overlay.names import TRUSTED, USER, USER_UPPER
from layerfs.vfs import checks
from layerfs.vfs.config import StackConfig


def find_prefix(config: StackConfig) -> str:
    """As the option says; else that of the upper where it tells; else `trusted.` where it can be set. Raises
    OSError.

    root of the host can set `trusted.` ones also in an upper that was made without privilege and holds
    `user.` ones: its root says so (`Upper`), and one prefix it stays."""
    if config.userxattr is not None:
        return USER if config.userxattr else TRUSTED
    if config.upper is not None and _says_user(config.upper):
        return USER
    if config.upper is None or config.read_only or config.work is None:
        return TRUSTED if os.geteuid() == 0 else USER
    work = OwnedFd(os.open(config.work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    return checks.probe(work.fd).prefix or USER


def _says_user(upper: str) -> bool:
    try:
        os.getxattr(upper, USER_UPPER)
    except OSError:
        return False
    return True
