from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.stack import Dir, File, Hardlink, Stack, Symlink, Tree

BIG = bytes(range(256)) * 1200
TREE: Tree = {
    "f": File(data=b"hello world\n"),
    "big": File(data=BIG),
    "sparse": File(data=b"x" * 4096, offset=1 << 20, size=3 << 20),
    "d": Dir(mode=0o750),
    "d/k": File(data=b"k\n"),
    "h1": File(data=b"linked\n"),
    "h2": Hardlink("h1"),
    "l": Symlink(target="f"),
}


@pytest.fixture(params=["all-lower", "all-upper", "merged"])
def laid_out(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A stack that holds `TREE`; the same tree in a plain directory, `mnt`."""
    prefix = "trusted.overlay." if os.geteuid() == 0 else "user.overlay."
    stack = Stack.arranged(request.param, prefix=prefix)
    stack.populate(TREE, request.param)
    stack.write(stack.mnt, TREE)
    yield stack
    stack.remove()
