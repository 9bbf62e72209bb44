"""Known failures, each with its reason. Each is an xfail(strict): a fix must take its line out of here.

`KERNEL`: where Linux overlayfs is not POSIX. `LAYERFS`: what pyfuse3 cannot carry; the native gate closes
them all. Nothing else may ever be added to `LAYERFS`.
"""

from __future__ import annotations

import re

# Rows: pattern of the test's name (function, with parameters in brackets where needed), arrangements, reason.
Row = tuple[str, tuple[str, ...], str]

UPPER, LOWER, MERGED, DEEP = "all-upper", "all-lower", "merged", "deep30"
ALL = (UPPER, LOWER, MERGED, DEEP)
COPIED = (LOWER, MERGED, DEEP)

KERNEL: list[Row] = []

LAYERFS: list[Row] = []


def reason(test: str, system: str) -> str | None:
    """Why this test is known to fail on this system, or None. `test` is the item's name, parameters
    included."""
    kind, _, arrangement = system.partition("-")
    bare = test.replace(f"[{system}-", "[").replace(f"[{system}]", "").replace(f"-{system}]", "]")
    for pattern, arrangements, why in {"kernel": KERNEL, "layerfs": LAYERFS}.get(kind, []):
        if arrangement in arrangements and re.fullmatch(pattern, bare):
            return why
    return None
