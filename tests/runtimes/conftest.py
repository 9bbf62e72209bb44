"""A root for the runtimes in two forms: a plain directory, the control, and a mount; and how to be a user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.mounts import Layerfs, PlainDir
from tests.support.stack import Stack
from tests.support.tree import lowers_guard

from .roots import root_tree

#: Makes a root; called once for each form.
Roots = Callable[..., Path]


@pytest.fixture(autouse=True)
def needs(root: None) -> None:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)


@pytest.fixture
def make_plain(make_stack: type[Stack]) -> Callable[..., PlainDir]:
    def make(owner: tuple[int, int] | None = None) -> PlainDir:
        stack = make_stack(n_lowers=0, name="plain", owner=owner, writable=False)
        tree = root_tree(devices=owner is None)
        stack.write(stack.mnt, tree)
        return PlainDir(stack)

    return make


@pytest.fixture
def make_mount(make_stack: type[Stack]) -> Iterator[Callable[..., Layerfs]]:
    """A mount of the same tree, spread over three lowers and the upper; the lowers stay as they are."""
    with ExitStack() as end:

        def make(options: str = "", owner: tuple[int, int] | None = None) -> Layerfs:
            prefix = "user.overlay." if owner else "trusted.overlay."
            stack = make_stack(n_lowers=3, name="root", owner=owner, prefix=prefix)
            stack.populate(root_tree(devices=owner is None), "merged")
            end.enter_context(lowers_guard(map(str, stack.lowers)))
            return end.enter_context(Layerfs(stack, options, as_user=owner))

        yield make
