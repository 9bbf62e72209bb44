"""The places at which a crash is interesting: after each on-disk step of an operation.

`step(name)` does nothing unless a test has put a function into `hook`; tests kill the process there, or shut
the file system down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

NAMES: Final = (
    "copyup.created",  # the temporary object is in the work directory, empty
    "copyup.data",  # it has its data
    "copyup.attributes",  # it has owner, mode, xattrs, times
    "copyup.synced",  # and is on disk (data copies only)
    "copyup.published",  # renamed into the upper
    "copyup.parent",  # the parent's times are put back
    "links.journalled",  # the names of a hard-linked file are written down
    "links.linked",  # one more of them is linked in the upper
    "links.done",  # the journal is gone
    "whiteout.made",  # a whiteout is ready in the work directory
    "whiteout.placed",  # it stands at its name
    "whiteout.removed",  # what it replaced is gone
    "create.made",  # a new object is ready in the work directory
    "create.placed",  # it stands at its name
    "create.removed",  # the whiteout it replaced is gone
    "rename.marked",  # redirect or opaque is set on what moves
    "rename.cleared",  # the target directory holds no whiteouts any more
    "rename.whiteout",  # (file form of whiteouts) the old name is hidden
    "rename.renamed",  # moved
    # a directory stops merging (redirect_dir=off, `layerfs flatten`):
    "whole.opaque",  # what it had below is in the upper, and it hides the lowers
    "whole.redirect",  # it names no other place any more
    "whole.whiteouts",  # whiteouts that mean nothing now, or stand in another form, are gone
    "remove.cleared",  # the directory holds no whiteouts any more
    "remove.done",  # it is gone
)

hook: Callable[[str], None] | None = None


def step(name: str) -> None:
    assert name in NAMES, name
    if hook is not None:
        hook(name)
