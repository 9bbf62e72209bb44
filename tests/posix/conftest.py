"""Runs each conformance function over each system: gives it a fresh directory that holds a known tree.

A test takes `fs` (a `Place`). What the directory holds is `STANDARD`, or what `@tree(...)` on the function
says. All trees of one test file are laid out in the layers first, then mounted once for each system.
`@compared` functions return what they observed; the same function then runs over a plain directory and must
return the same.

Which tests are known to fail, and why, stands in `known`.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.support import mounts
from tests.support.stack import ARRANGEMENTS, Stack, scratch_root

from . import known
from .place import STANDARD, Place, oracle, possible

SYSTEMS = ["plain", *(f"kernel-{a}" for a in ARRANGEMENTS), *(f"layerfs-{a}" for a in ARRANGEMENTS)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fs" in metafunc.fixturenames:
        metafunc.parametrize("mounted", SYSTEMS, indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kind = config.getoption("--file-system")
    here = os.path.dirname(__file__)
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and str(item.path).startswith(here)
            and hasattr(item, "callspec")
        ):
            system = str(item.callspec.params.get("mounted", ""))
            if system and (reason := known.reason(item.name, system, kind)):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


def directory_of(item: pytest.Function) -> str:
    """Name of the test's directory: the same on every system."""
    system = item.callspec.params["mounted"]
    plain = item.name.replace(f"[{system}", "[").replace(f"-{system}", "")
    name = re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")
    return f"{name[:40]}-{zlib.crc32(plain.encode()) & 0xFFFF:x}"


@pytest.fixture(scope="module")
def mounted(request: pytest.FixtureRequest) -> Iterator[mounts.Mounted]:
    system, _, arrangement = request.param.partition("-")
    # An ordinary user's layers: xattrs in the user namespace, `.wh.` files where devices cannot be made.
    prefix = "trusted.overlay." if os.geteuid() == 0 else "user.overlay."
    stack = Stack() if system == "plain" else Stack.arranged(arrangement, prefix=prefix)
    for item in request.session.items:
        if not isinstance(item, pytest.Function) or item.module is not request.module:
            continue
        if hasattr(item, "callspec") and item.callspec.params.get("mounted") == request.param:
            tree = possible(getattr(item.function, "tree", STANDARD))
            under = directory_of(item)
            if system == "plain":
                stack.write(stack.mnt, tree, under)
            else:
                stack.populate(tree, arrangement, under, salt=zlib.crc32(item.originalname.encode()) & 0xFF)
    m: mounts.Mounted
    if system == "plain":
        m = mounts.PlainDir(stack)
    elif system == "kernel":
        if reason := mounts.why_no_kernel_overlay():
            pytest.skip(reason)
        m = mounts.KernelOverlay(stack)
    else:
        if reason := mounts.why_no_layerfs():
            pytest.skip(reason)
        m = mounts.Layerfs(stack)
    with m:
        yield m
    if not request.config.getoption("--keep-stacks"):
        stack.remove()


@pytest.fixture
def fs(request: pytest.FixtureRequest, mounted: mounts.Mounted) -> Iterator[Place]:
    system, _, arrangement = request.node.callspec.params["mounted"].partition("-")
    # An earlier test may have killed the daemon, or failed in a remount; this one is not to suffer.
    if mounts.is_dead_mount(mounted.mnt):
        mounted.close()
    if mounted not in mounts.live:
        mounted.open()
    tree = getattr(request.function, "tree", STANDARD)
    gap = known.without_gate(request.node.name, request.node.callspec.params["mounted"])
    if gap and isinstance(mounted, mounts.Layerfs) and not mounted.has_gate():
        request.node.add_marker(pytest.mark.xfail(strict=True, reason=gap))
    place = Place(str(mounted.mnt / directory_of(request.node)), system, arrangement, mounted, tree)
    yield place
    place.release()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """What fails on a plain directory as well is skipped: for an ordinary user, who tries that first, because
    it needs root; with --file-system, where it is tried after a failure, because that file system cannot.
    """
    place = pyfuncitem.funcargs.get("fs")
    if not isinstance(place, Place) or place.system == "plain":
        return (yield)
    others = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames if name != "fs"}
    if os.geteuid() != 0:
        with oracle(place.tree) as plain:
            try:
                pyfuncitem.obj(plain, **others)
            except Exception as e:
                name = type(e).__name__
                pytest.skip(f"an ordinary user cannot do this on a plain directory either: {name}")
    try:
        return (yield)
    except Exception:
        kind = pyfuncitem.config.getoption("--file-system")
        if kind is None or pyfuncitem.get_closest_marker("xfail"):
            raise
        with oracle(place.tree, str(scratch_root())) as plain:
            try:
                pyfuncitem.obj(plain, **others)
            except Exception as e:
                pytest.skip(f"not so in a plain directory on {kind} either: {type(e).__name__}")
        raise


def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> str | None:
    if isinstance(val, int) and not isinstance(val, bool) and argname in ("mode", "flags"):
        return oct(val)
    return getattr(val, "__name__", None)
