"""Where large things lie for a while: what layers hold while they are joined, ephemeral uppers."""

from __future__ import annotations

import os


def temporary_place() -> str:
    """$TMPDIR, else /var/tmp: on disk, where /tmp often is memory."""
    return os.environ.get("TMPDIR") or "/var/tmp"
