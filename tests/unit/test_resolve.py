"""Redirects, opaque marks and metadata-only files: what they lead to, by hand and compared with kernel
overlayfs on the same layers.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from layerfs.ids import ROOT
from layerfs.overlay.names import TRUSTED, XattrNames
from layerfs.stack import Stack as Layers
from layerfs.vfs.vfs import Caller, Vfs
from tests.support.mounts import KernelOverlay
from tests.support.stack import Stack

NAMES = XattrNames(TRUSTED)
pytestmark = pytest.mark.usefixtures("root")


def redirect(to: str, **content: object) -> dict[str, object]:
    return {"REDIRECT": to, **content}


def opaque(**content: object) -> dict[str, object]:
    return {"OPAQUE": True, **content}


def metacopy(size: int, to: str | None = None) -> tuple[int, str | None]:
    """A file with attributes only, of `size` bytes."""
    return (size, to)


WHITEOUT = None

#: name -> layers, top first. Content: bytes is a file, a dict a directory, None a whiteout.
CASES: dict[str, list[dict[str, Any]]] = {
    "relative": [{"d": {"new": redirect("old", top=b"t")}}, {"d": {"old": {"x": b"x"}}}],
    "absolute": [{"new": redirect("/a/b/old")}, {"a": {"b": {"old": {"x": b"x"}}}}],
    "absolute, not at the top": [
        {"p": {"new": redirect("/old")}},
        {"old": {"x": b"x"}, "p": {"new": {"hidden": b""}}},
    ],
    "of a moved parent": [
        {"p2": redirect("/p1", c2=redirect("c1"))},
        {"p1": {"c1": {"x": b"x"}, "other": b"o"}},
    ],
    "of a moved parent, absolute": [
        {"p2": redirect("/p1", c2=redirect("/q/c1"))},
        {"p1": {"c1": {"no": b""}}, "q": {"c1": {"x": b""}}},
    ],
    "chain": [
        {"n3": redirect("/n2", a=b"3")},
        {"n2": redirect("/n1", a=b"2", b=b"2")},
        {"n1": {"a": b"1", "b": b"1", "c": b"1"}},
    ],
    "chain of siblings": [
        {"d": {"n3": redirect("n2")}},
        {"d": {"n2": redirect("n1")}},
        {"d": {"n1": {"c": b"1"}}},
    ],
    "through a parent moved below": [
        {"n": redirect("/p/c")},
        {"p": redirect("/q", m=b"")},
        {"q": {"c": {"x": b"x"}}},
    ],
    "through a parent moved below, end there": [
        {"n": redirect("/p/c")},
        {"p": redirect("/q", c={"y": b""})},
        {"q": {"c": {"x": b"x"}}, "p": {"c": {"z": b""}}},
    ],
    "to nothing": [{"new": redirect("/nowhere", a=b"")}, {"other": b""}],
    "to a file": [{"new": redirect("/f", a=b"")}, {"f": b"data"}],
    "to a whiteout": [{"new": redirect("/old", a=b"")}, {"old": WHITEOUT}, {"old": {"x": b""}}],
    "under a whiteout": [{"new": redirect("/p/old", a=b"")}, {"p": WHITEOUT}, {"p": {"old": {"x": b""}}}],
    "to an opaque directory": [{"new": redirect("/old")}, {"old": opaque(a=b"")}, {"old": {"x": b""}}],
    "under an opaque directory": [
        {"new": redirect("/p/old")},
        {"p": opaque(old={"a": b""})},
        {"p": {"old": {"x": b""}}},
    ],
    "under an opaque directory without it": [
        {"new": redirect("/p/old")},
        {"p": opaque(a=b"")},
        {"p": {"old": {"x": b""}}},
    ],
    "a layer without it between": [
        {"new": redirect("/p/old")},
        {"p": {"else": b""}},
        {"p": {"old": {"x": b""}}},
    ],
    "a layer without its parent between": [
        {"new": redirect("/p/old")},
        {"q": {}},
        {"p": {"old": {"x": b""}}},
    ],
    "under a file": [{"new": redirect("/p/old", a=b"")}, {"p": b"file"}, {"p": {"old": {"x": b""}}}],
    "own name below is not merged": [{"new": redirect("/old")}, {"new": {"no": b""}, "old": {"x": b""}}],
    "moved away and made again": [{"new": redirect("/old"), "old": opaque(a=b"")}, {"old": {"x": b""}}],
    "two moved into each other's place": [
        {"a": redirect("b"), "b": redirect("a")},
        {"a": {"of-a": b""}, "b": {"of-b": b""}},
    ],
    "opaque in the middle": [{"d": {"1": b""}}, {"d": opaque(**{"2": b""})}, {"d": {"3": b""}}],
    "file in the middle": [{"d": {"1": b""}}, {"d": b"file"}, {"d": {"3": b""}}],
    "deep": [
        {"a": {"b": {"c": redirect("/x/y/z")}}},
        {"x": {"y": redirect("/u/v")}},
        {"u": {"v": {"z": {"end": b"!"}}}},
    ],
    "metacopy": [{"f": metacopy(4)}, {"f": b"data"}],
    "metacopy, moved": [{"g": metacopy(4, "/d/f")}, {"d": {"f": b"data"}}],
    "metacopy, moved beside": [{"d": {"g": metacopy(4, "f")}}, {"d": {"f": b"data"}}],
    "metacopy chain": [{"f": metacopy(4)}, {"f": metacopy(4)}, {"f": b"data"}],
    "metacopy chain, moved each time": [{"h": metacopy(4, "/g")}, {"g": metacopy(4, "/f")}, {"f": b"data"}],
    "metacopy chain, moved once": [{"h": metacopy(4)}, {"h": metacopy(4, "/f")}, {"f": b"data"}],
    "metacopy over a layer without it": [{"g": metacopy(4, "/d/f")}, {"d": {}}, {"d": {"f": b"data"}}],
    "metacopy in a moved directory": [{"e": redirect("/d", f=metacopy(4))}, {"d": {"f": b"data"}}],
    "metacopy of a file in a directory moved below": [
        {"g": metacopy(4, "/e/f")},
        {"e": redirect("/d")},
        {"d": {"f": b"data"}},
    ],
    "metacopy without data": [{"f": metacopy(4)}, {"other": b""}],
    "metacopy of a directory": [{"f": metacopy(4)}, {"f": {"x": b""}}],
    "metacopy of a whiteout": [{"f": metacopy(4, "/g")}, {"g": WHITEOUT}, {"g": b"data"}],
    "metacopy at the bottom": [{"g": b""}, {"f": metacopy(4)}],
    "redirect ..": [{"d": redirect("..", a=b"")}, {"d": {"x": b""}}],
    "redirect /..": [{"d": redirect("/../etc", a=b"")}, {"d": {"x": b""}}],
    "redirect a/b": [{"d": redirect("a/b", a=b"")}, {"a": {"b": {"x": b""}}}],
}

#: Where layerfs is stricter than the kernel, which leaves the answer to who looks: both are errors or
#: neither shows the lower content.
_NONSENSE = ("redirect ..", "redirect /..", "redirect a/b")


def fill(directory: Path, content: dict[str, Any]) -> None:
    for name, what in content.items():
        path = directory / name
        if name == "REDIRECT":
            os.setxattr(directory, NAMES.redirect, what.encode())
        elif name == "OPAQUE":
            os.setxattr(directory, NAMES.opaque, b"y")
        elif what is WHITEOUT:
            os.mknod(path, stat.S_IFCHR, 0)
        elif isinstance(what, dict):
            path.mkdir()
            fill(path, what)
        elif isinstance(what, tuple):
            path.touch()
            os.truncate(path, what[0])
            os.setxattr(path, NAMES.metacopy, b"")
            if what[1] is not None:
                os.setxattr(path, NAMES.redirect, what[1].encode())
        else:
            path.write_bytes(what)


def by_kernel(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}

    def walk(directory: Path) -> None:
        for name in sorted(os.listdir(directory)):
            path = directory / name
            shown = str(path.relative_to(top))
            try:
                if stat.S_ISDIR(path.lstat().st_mode):
                    found[shown] = "directory"
                    walk(path)
                else:
                    found[shown] = path.read_bytes()
            except OSError as error:
                found[shown] = errno.errorcode[error.errno or 0]

    walk(top)
    return found


async def by_layerfs(lowers: list[str], upper: str | None) -> dict[str, object]:
    found: dict[str, object] = {}
    me = Caller(0, 0, 0)
    async with trio.open_nursery() as nursery:
        vfs = Vfs(Layers(lowers, upper, NAMES), None, nursery)

        async def walk(id: int, path: str) -> None:
            handle = await vfs.opendir(id)
            await vfs.rewind(handle)
            for name in sorted(vfs.listing(handle).names):
                shown = f"{path}{os.fsdecode(name)}"
                try:
                    at = await vfs.lookup(id, name)
                    assert at is not None
                    if stat.S_ISDIR(at.st.st_mode):
                        found[shown] = "directory"
                        await walk(at.ino, shown + "/")
                    else:
                        opened = await vfs.open(at.ino, os.O_RDONLY, me)
                        found[shown] = bytes(await vfs.files.read(opened.id, 0, 100))
                except OSError as error:
                    found[shown] = errno.errorcode[error.errno or 0]

        await walk(ROOT, "")
    return found


@pytest.fixture
def layered(make_stack: type[Stack], request: pytest.FixtureRequest) -> Iterator[Stack]:
    content = CASES[request.param[0]]
    as_upper = request.param[1]
    stack = make_stack(n_lowers=len(content) - as_upper, writable=as_upper)
    tops = ([stack.upper] if stack.upper else []) + stack.lowers
    for path, each in zip(tops, content, strict=True):
        fill(path, each)
    yield stack


_ALL = [
    pytest.param((name, as_upper), id=f"{name}{'; top is upper' if as_upper else ''}")
    for name in CASES
    for as_upper in (False, True)
]


@pytest.mark.parametrize("layered", _ALL, indirect=True)
def test_as_the_kernel(kernel_overlay: None, layered: Stack, request: pytest.FixtureRequest) -> None:
    if len(layered.lowers) == 1 and layered.upper is None:
        pytest.skip("one layer alone is no overlay")
    ours = trio.run(
        by_layerfs, [str(path) for path in layered.lowers], str(layered.upper) if layered.upper else None
    )
    with KernelOverlay(layered) as mount:
        theirs = by_kernel(mount.mnt)
    if any(name in request.node.name for name in _NONSENSE):
        assert ours["d"] == "EIO"
        assert theirs.get("d") != "directory" or "d/x" not in theirs
        return
    # An upper that redirects to a name still in sight shows one lower object twice; the kernel then gives
    # ESTALE for the second.
    twice = tuple(path for path, what in theirs.items() if what == "ESTALE")
    for path in [
        path for path in ours if path in twice or path.startswith(tuple(f"{each}/" for each in twice))
    ]:
        del ours[path]
        theirs.pop(path, None)
    assert ours == theirs


def test_a_redirect_of_the_lowest_layer_leads_nowhere(make_stack: type[Stack]) -> None:
    stack = make_stack(n_lowers=1)
    fill(stack.lowers[0], {"a": redirect("/b", x=b"x"), "b": {"y": b"y"}})
    found = trio.run(by_layerfs, [str(stack.lowers[0])], None)
    assert found == {"a": "directory", "a/x": b"x", "b": "directory", "b/y": b"y"}


def test_symlinks_in_the_way_are_not_followed(make_stack: type[Stack]) -> None:
    """A layer's author may put a link where a redirect leads through."""
    stack = make_stack(n_lowers=2)
    outside = stack.dir / "outside"
    (outside / "old").mkdir(parents=True)
    (outside / "old" / "secret").write_text("secret")
    fill(stack.lowers[0], {"new": redirect("/p/old"), "f": metacopy(6, "/p/old/secret")})
    os.symlink(outside, stack.lowers[1] / "p")
    found = trio.run(by_layerfs, [str(path) for path in stack.lowers], None)
    assert "new/secret" not in found
    assert found["f"] == "EIO"
