"""Lower layers given through idmapped mounts together with `uidmapping=`, as containers/storage does it: the
ids are mapped once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.overlay.test_owners import COUNT, FIRST, OPTIONS, idmapped, lay_out, user_namespace
from tests.support import mounts
from tests.support.mounts import Layerfs
from tests.support.stack import Stack
from tests.support.tree import assert_equal, snapshot

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("root")]


def test_ids_are_mapped_once(make_stack: type[Stack]) -> None:
    """The same as with the layer itself, through a symbolic link in the idmapped mount as well."""
    stack = make_stack(n_lowers=1)
    directory = stack.lowers[0]
    (directory / "layer").mkdir()
    lay_out(directory / "layer")
    (directory / "link").symlink_to("layer")
    shadow = make_stack(n_lowers=1).lowers[0]
    stack.lowers = [directory / "layer"]
    with Layerfs(stack, OPTIONS) as mount:
        expected = snapshot(mount.mnt)
    assert (expected[b"f"].uid, expected[b"f"].gid) == (FIRST + 5, FIRST + 6)
    assert expected[b"foreign"].uid == 65534 and COUNT < 70_000
    with user_namespace() as child, idmapped(directory, shadow, child):
        for name in ("layer", "link"):
            again = make_stack(n_lowers=0)
            again.lowers = [shadow / name]
            with Layerfs(again, OPTIONS) as mount:
                assert_equal(expected, snapshot(mount.mnt), ignore=("mtime_ns",))
                (mount.mnt / "f").chmod(0o600)
                assert (mount.mnt / "f").stat().st_uid == FIRST + 5
            assert again.upper is not None and (again.upper / "f").stat().st_uid == 5


def test_a_layer_that_is_mounted_nowhere_else_is_refused(make_stack: type[Stack]) -> None:
    stack = make_stack(n_lowers=1)
    hidden = stack.lowers[0]
    shadow = make_stack(n_lowers=1).lowers[0]
    mounts.mount("none", hidden, "tmpfs")
    with user_namespace() as child, idmapped(hidden, shadow, child):
        mounts.umount(hidden)
        stack.lowers = [shadow]
        with pytest.raises(AssertionError, match="idmapped mount and is mounted nowhere else"):
            _mount(stack)
        stack.lowers = [Path(shadow)]
        with Layerfs(stack):  # without a mapping it is a layer like any other
            pass


def _mount(stack: Stack) -> None:
    """Raises AssertionError with what the command said."""
    words = ["mount", "--lower", str(stack.lowers[0]), "-o", OPTIONS, str(stack.mnt)]
    done = subprocess.run([*mounts.layerfs_command(), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
