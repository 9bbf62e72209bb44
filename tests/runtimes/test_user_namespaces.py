"""A container in a user namespace of its own, as root starts it: what an idmapped mount does elsewhere,
`uidmapping` does here.

The kernel makes an idmapped mount of a FUSE file system only when its daemon asked for that (FUSE_ALLOW_IDMAP
in INIT, Linux 6.12); neither libfuse 3.14 nor pyfuse3 can ask. A native gate in front of them could.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

import pytest

from tests.overlay.test_owners import COUNT, FIRST, OPTIONS, idmapped, user_namespace
from tests.support import mounts
from tests.support.mounts import FuseOverlayfs, Layerfs, PlainDir
from tests.support.stack import Stack
from tests.support.tree import assert_equal, snapshot

from .runtimes import run_here, runc_mapped
from .test_runtimes import FILES, OWNERS, SUID, control, same

Make = Callable[..., Layerfs]
MakePlain = Callable[..., PlainDir]


def why_no_idmapped_mount(stack: Stack, of: str | os.PathLike[str]) -> int | None:
    """errno of the attempt to show `of` on the stack's mount point with mapped owners."""
    target = stack.dir / "idmapped"
    target.mkdir(exist_ok=True)
    try:
        with user_namespace() as child, idmapped(of, target, child):  # type: ignore[arg-type]
            return None
    except OSError as error:
        return error.errno


def test_the_kernel_makes_no_idmapped_mount_of_layerfs(make_mount: Make, make_stack: type[Stack]) -> None:
    """When this fails because it does: README names it among the gaps, and there is a better way then."""
    plain = make_stack()
    if (number := why_no_idmapped_mount(plain, plain.lowers[0])) is not None:
        pytest.skip(f"no idmapped mount of a plain directory here: {errno.errorcode[number]}")
    assert why_no_idmapped_mount(make_stack(), make_mount().mnt) == errno.EINVAL
    if mounts.why_no_fuse_overlayfs() is None:
        with FuseOverlayfs(make_stack()) as other:
            assert why_no_idmapped_mount(make_stack(), other.mnt) == errno.EINVAL


@pytest.mark.parametrize("script", [FILES, OWNERS, SUID], ids=["files", "owners", "suid"])
def test_runc_with_a_user_namespace(script: str, make_plain: MakePlain, make_mount: Make) -> None:
    """With `uidmapping=0:100000:65536` as on an idmapped mount of a plain directory: what it prints,
    and the owners that are stored.
    """
    began = time.time_ns() - 10**9
    runtime = runc_mapped(FIRST, COUNT)
    plain = make_plain()
    oracle = plain.stack.dir / "idmapped"
    oracle.mkdir()
    with user_namespace() as child, idmapped(plain.mnt, oracle, child):
        want = control(runtime, oracle, script)
    m = make_mount(OPTIONS)
    same(runtime.start(m.mnt, script, False, run_here), want)
    m.close()
    m.options.clear()
    with m:
        assert_equal(snapshot(plain.mnt), snapshot(m.mnt), recent_ns=began, labels=("plain", "stored"))
