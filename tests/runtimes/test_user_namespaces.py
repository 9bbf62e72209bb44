"""A container in a user namespace of its own, as root starts it: on an idmapped mount of the mount, made by
the runtime or by somebody before it, or on a mount with `uidmapping`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.overlay.test_idmapped import why_not
from tests.overlay.test_owners import COUNT, FIRST, OPTIONS, idmapped, user_namespace
from tests.support.mounts import Layerfs, PlainDir
from tests.support.tree import assert_equal, snapshot

from .runtimes import nspawn_mapped, run_here, runc_mapped
from .test_runtimes import FILES, OWNERS, SUID, control, same

Make = Callable[..., Layerfs]
MakePlain = Callable[..., PlainDir]


scripts = pytest.mark.parametrize("script", [FILES, OWNERS, SUID], ids=["files", "owners", "suid"])


@scripts
@pytest.mark.parametrize("way", ["uidmapping", "idmapped"])
def test_runc_with_a_user_namespace(way: str, script: str, make_plain: MakePlain, make_mount: Make) -> None:
    """As on an idmapped mount of a plain directory: what it prints, and the owners that are stored."""
    began = time.time_ns() - 10**9
    runtime = runc_mapped(FIRST, COUNT)
    plain = make_plain()
    oracle = plain.stack.dir / "idmapped"
    oracle.mkdir()
    if way == "idmapped" and (reason := why_not(plain.stack)):
        pytest.skip(reason)
    with user_namespace() as child:
        with idmapped(plain.mnt, oracle, child):
            want = control(runtime, oracle, script)
        m = make_mount(OPTIONS if way == "uidmapping" else "")
        if way == "uidmapping":
            same(runtime.start(m.mnt, script, False, run_here), want)
            m.close()
            m.options.clear()
            m.open()
        else:
            shown = m.stack.dir / "idmapped"
            shown.mkdir()
            with idmapped(m.mnt, shown, child):
                same(runtime.start(shown, script, False, run_here), want)
    assert_equal(snapshot(plain.mnt), snapshot(m.mnt), recent_ns=began, labels=("plain", "stored"))


@scripts
def test_systemd_nspawn_with_a_user_namespace(script: str, make_plain: MakePlain, make_mount: Make) -> None:
    """It makes the idmapped mount itself."""
    began = time.time_ns() - 10**9
    runtime = nspawn_mapped(FIRST, COUNT)
    plain = make_plain()
    if reason := why_not(plain.stack):
        pytest.skip(reason)
    want = control(runtime, plain.mnt, script)
    m = make_mount()
    same(runtime.start(m.mnt, script, False, run_here), want)
    assert_equal(snapshot(plain.mnt), snapshot(m.mnt), recent_ns=began, labels=("plain", "stored"))
