"""Names that mean whiteouts, in every form and abuse: what they hide, never touch, and how they go away."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Stack
from tests.support.tree import assert_equal, snapshot

from .conftest import Box, assert_alive, content, err, fill, mark, names, walk

MAKERS: dict[str, Callable[[Path], object]] = {
    "file": lambda p: p.write_text(""),
    "file with content": lambda p: p.write_text("content"),
    "directory": lambda p: p.mkdir(),
    "directory with content": lambda p: fill(p / "inside", "file"),
    "symlink out": lambda p: p.symlink_to("../../canary"),
    "device": lambda p: os.mknod(p, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "whiteout device": lambda p: os.mknod(p, stat.S_IFCHR, 0),
    "fifo": os.mkfifo,
}


ODD = [".wh.", ".wh..", ".wh...", ".wh..wh.", ".wh..wh..", ".wh..wh..wh.x", ".wh..wh..opq", ".wh.x"]


def test_odd_whiteout_names(box: Box) -> None:
    """`.wh.x` hides x; `.wh.`, `.wh..` and `.wh...` hide nothing; none is ever seen or steers outside.
    The directory that holds them can be emptied and removed.
    """
    for kind, make in MAKERS.items():
        for number, name in enumerate(ODD):
            here = fill(box.upper / kind / f"d{number}", "own")
            make(here / name)
            fill(box.lowers[0] / kind / f"d{number}", "x", "below")
            fill(box.lowers[0] / kind / f"d{number}" / "sub", "deep")
    box.layers_done()
    with box.layerfs() as m:
        for kind in MAKERS:
            assert names(m.mnt / kind) == [f"d{n}" for n in range(8)]
            for number in (0, 1, 2, 3, 4, 5):
                assert names(m.mnt / kind / f"d{number}") == ["below", "own", "sub", "x"], (kind, number)
            assert names(m.mnt / kind / "d6") == ["own"], kind
            assert names(m.mnt / kind / "d7") == ["below", "own", "sub"], kind
        walk(m.mnt)
        for kind in MAKERS:
            for number in range(8):
                here = m.mnt / kind / f"d{number}"
                assert not [n for n in os.listdir(here) if n.startswith(".wh.")]
                os.rename(here, m.mnt / kind / "moved")
                os.rename(m.mnt / kind / "moved", here)
                for name in os.listdir(here):
                    if name == "sub":
                        os.unlink(here / "sub" / "deep")
                        os.rmdir(here / "sub")
                    else:
                        os.unlink(here / name)
                assert err(os.rmdir, here) is None, (kind, number)
            assert names(m.mnt / kind) == []
        m.remount()
        assert {kind: names(m.mnt / kind) for kind in MAKERS} == {kind: [] for kind in MAKERS}
        assert_alive(m)


def test_odd_whiteout_names_in_a_lower(box: Box) -> None:
    top, bottom = box.lowers
    for kind, make in MAKERS.items():
        for number, name in enumerate([".wh.", ".wh..", ".wh...", ".wh..wh..opq", ".wh.x", ".wh.sub"]):
            make(fill(top / kind / f"d{number}", "own") / name)
            fill(bottom / kind / f"d{number}", "x")
            fill(bottom / kind / f"d{number}" / "sub", "deep")
        make(top / f".wh.hidden {kind}")
        (bottom / f"hidden {kind}").write_text("hidden")
    # At the layer's root too: nothing above it is meant.
    (top / ".wh..").touch()
    fill(top / ".wh...", "inside")
    box.layers_done()
    with box.layerfs() as m:
        assert names(m.mnt) == sorted(MAKERS)
        for kind in MAKERS:
            here = m.mnt / kind
            assert names(here) == [f"d{n}" for n in range(6)]
            assert [names(here / f"d{n}") for n in range(6)] == [
                *([["own", "sub", "x"]] * 3),
                ["own"],
                ["own", "sub"],
                ["own", "x"],
            ], kind
            # A hidden name can be made anew, and then shows nothing of what is hidden.
            os.mkdir(here / "d5" / "sub")
            assert names(here / "d5" / "sub") == []
            (here / "d4" / "x").write_text("new")
            (m.mnt / f"hidden {kind}").write_text("new")
        before = snapshot(m.mnt)
        m.remount()
        assert_equal(before, snapshot(m.mnt))
        assert_alive(m)


#: Ways in which a hidden name comes back, given a source (where there is one) and the name.
OPERATIONS: dict[str, Callable[[Path, Path], object]] = {
    "create": lambda source, name: name.write_text("new"),
    "mkdir": lambda source, name: fill(name, "in"),
    "symlink": lambda source, name: name.symlink_to("target"),
    "mkfifo": lambda source, name: os.mkfifo(name),
    "link": os.link,
    "rename upper file": os.rename,
    "rename lower file": os.rename,
    "rename upper directory": os.rename,
    "rename lower directory": os.rename,
    "rename merged directory": os.rename,
}


@pytest.mark.parametrize(
    "form,options",
    [
        ("device", ""),
        ("file", ""),
        ("both", ""),
        ("xattr", ""),
        ("both", "redirect_dir=off,metacopy=off"),
    ],
)
def test_names_hidden_in_either_form_come_back(
    box: Box, kernel_overlay: None, form: str, options: str
) -> None:
    """Uppers of ordinary users and of other tools hold `.wh.` files where this mount would make devices."""
    hidden = {f"h{i}-{kind}": kind for i in range(len(OPERATIONS)) for kind in ("file", "dir")}
    for name, kind in hidden.items():
        if kind == "dir":
            fill(box.lowers[0] / name, "never")
        else:
            (box.lowers[0] / name).write_text("never")
        if form in ("device", "both"):
            os.mknod(box.upper / name, stat.S_IFCHR, 0)
        if form in ("file", "both"):
            (box.upper / f".wh.{name}").touch()
        if form == "xattr":
            (box.upper / name).touch()
            mark(box.upper / name, "whiteout")
    if form == "xattr":
        mark(box.upper, "opaque", b"x")
    fill(box.upper / "spare")
    for kind in ("file", "dir"):
        for number, operation in enumerate(OPERATIONS):
            place = box.lowers[0] if "lower" in operation or "merged" in operation else box.upper
            base = f"src-{number}-{kind}"
            if operation.endswith("directory"):
                fill(place / base, "inside")
                if "merged" in operation:
                    fill(box.upper / base, "above")
            elif operation.startswith(("rename", "link")):
                (place / base).write_text(operation)
    box.layers_done()
    with box.layerfs(options) as m:
        assert not set(os.listdir(m.mnt)) & set(hidden)
        for kind in ("file", "dir"):
            for number, operation in enumerate(OPERATIONS):
                source = m.mnt / f"src-{number}-{kind}"

                target = m.mnt / f"h{number}-{kind}"
                assert err(OPERATIONS[operation], source, target) is None, (operation, kind)
                if target.is_dir():
                    assert "never" not in os.listdir(target), (operation, kind)
                    assert len(os.listdir(target)) in (1, 2)
        before = snapshot(m.mnt)
        m.remount()
        assert_equal(before, snapshot(m.mnt), message="after remount")
        # And away again: what the lowers have stays hidden.
        for name in hidden:
            path = m.mnt / name
            if path.is_dir() and not path.is_symlink():
                for inner in os.listdir(path):
                    os.unlink(path / inner)
                os.rmdir(path)
            else:
                os.unlink(path)
        assert not set(os.listdir(m.mnt)) & set(hidden)
        before = snapshot(m.mnt)
        m.remount()
        assert not set(os.listdir(m.mnt)) & set(hidden)
        assert_equal(before, snapshot(m.mnt), message="after removal")
        assert_alive(m)
    if form == "device":
        with box.kernel() as kernel:
            assert_equal(before, snapshot(kernel.mnt), message="under the kernel")


def test_whiteout_of_a_directory_with_content(box: Box, kernel_overlay: None) -> None:
    """A whiteout hides all of it, in each layer; a directory above the whiteout starts empty."""
    top, bottom = box.lowers
    for name in ("gone", "gone-by-file", "back", "back-by-file"):
        fill(bottom / name / "sub", "deep")
        fill(bottom / name, "f")
    os.mknod(top / "gone", stat.S_IFCHR, 0)
    (top / ".wh.gone-by-file").touch()
    os.mknod(top / "back", stat.S_IFCHR, 0)
    (top / ".wh.back-by-file").touch()
    fill(box.upper / "back", "new")
    fill(box.upper / "back-by-file", "new")
    # Beside its own whiteout a directory of the same layer is seen, without what lies below.
    fill(top / "beside", "own")
    (top / ".wh.beside").touch()
    fill(bottom / "beside", "never")
    box.layers_done()
    with box.layerfs() as m:
        assert names(m.mnt) == ["back", "back-by-file", "beside"]
        assert names(m.mnt / "back") == names(m.mnt / "back-by-file") == ["new"]
        assert names(m.mnt / "beside") == ["own"]
        assert content(m.mnt / "gone" / "sub" / "deep") == "ENOENT"
        assert_alive(m)


def test_directories_and_symlinks_in_turn(box: Box, kernel_overlay: None) -> None:
    """A directory over a symlink to a directory, the reverse, and links out of the layers in between."""
    top, bottom = box.lowers
    fill(bottom / "real", "f")
    (bottom / "dir-over-link").symlink_to("real")
    fill(box.upper / "dir-over-link", "own")
    (bottom / "dir-over-link-out").symlink_to(box.canary)
    fill(box.upper / "dir-over-link-out", "own")
    fill(bottom / "link-over-dir", "never")
    (box.upper / "link-over-dir").symlink_to("real")
    fill(bottom / "link-out-over-dir", "never")
    (box.upper / "link-out-over-dir").symlink_to("/proc/self/root/etc")
    # In the middle: the link ends what is merged.
    fill(box.upper / "sandwich", "top")
    (top / "sandwich").symlink_to(box.canary)
    fill(bottom / "sandwich", "never")
    fill(top / "lower-dir-over-link", "own")
    (bottom / "lower-dir-over-link").symlink_to(box.canary)
    box.layers_done()
    with box.kernel() as kernel:
        by_kernel = walk(kernel.mnt)
    with box.layerfs() as m:
        assert walk(m.mnt) == by_kernel
        for name in ("dir-over-link", "dir-over-link-out", "sandwich", "lower-dir-over-link"):
            (m.mnt / name / "secret").write_text("in the upper")
            os.rename(m.mnt / name, m.mnt / f"{name}-moved")
            assert names(m.mnt / f"{name}-moved") in (["own", "secret"], ["secret", "top"])
            assert err(os.lstat, m.mnt / name) == "ENOENT"
        for name in ("link-over-dir", "link-out-over-dir"):
            os.unlink(m.mnt / name)
            assert err(os.lstat, m.mnt / name) == "ENOENT"
        before = snapshot(m.mnt)
        m.remount()
        assert_equal(before, snapshot(m.mnt))
        assert_alive(m)
    with box.kernel() as kernel:
        assert_equal(before, snapshot(kernel.mnt), message="under the kernel")


def test_hard_linked_whiteouts(box: Box, kernel_overlay: None) -> None:
    """Many names of one 0/0 device: each hides its own name, and going away takes no other with it."""
    top = box.lowers[0]
    for layer in (box.upper, top):
        os.mknod(layer / f"{layer.name}0", stat.S_IFCHR, 0)
        for n in range(1, 5):
            os.link(layer / f"{layer.name}0", layer / f"{layer.name}{n}")
        for n in range(5):
            (box.lowers[1] / f"{layer.name}{n}").write_text("never")
    # And one that shares its inode with a name outside the upper: it must never be written to.
    os.mknod(box.stack.dir / "outside", stat.S_IFCHR, 0)
    os.link(box.stack.dir / "outside", box.upper / "shared")
    (box.lowers[1] / "shared").write_text("never")
    outside = os.stat(box.stack.dir / "outside")
    box.layers_done()
    with box.layerfs() as m:
        assert names(m.mnt) == []
        (m.mnt / "upper0").write_text("back")
        (m.mnt / "shared").write_text("back")
        os.mkdir(m.mnt / "upper1")
        os.chmod(m.mnt / "shared", 0o777)
        (m.mnt / "lower01").write_text("back")
        assert names(m.mnt) == ["lower01", "shared", "upper0", "upper1"]
        os.unlink(m.mnt / "upper0")
        os.rmdir(m.mnt / "upper1")
        assert names(m.mnt) == ["lower01", "shared"]
        before = snapshot(m.mnt)
        m.remount()
        assert_equal(before, snapshot(m.mnt))
        assert_alive(m)
    after = os.stat(box.stack.dir / "outside")
    assert stat.S_ISCHR(after.st_mode) and after.st_mode == outside.st_mode
    with box.kernel() as kernel:
        assert_equal(before, snapshot(kernel.mnt), message="under the kernel")


def test_devices_like_whiteouts(make_stack: type[Stack], root: None) -> None:
    """A block device 0/0 and a character device 0/1 are devices, not whiteouts."""
    stack = make_stack()
    assert stack.upper is not None
    for layer, name in ((stack.upper, "up"), (stack.lowers[0], "low")):
        os.mknod(layer / f"{name}-block", stat.S_IFBLK | 0o600, 0)
        os.mknod(layer / f"{name}-char", stat.S_IFCHR | 0o600, os.makedev(0, 1))
    with KernelOverlay(stack) as kernel:
        by_kernel = snapshot(kernel.mnt)
    with Layerfs(stack) as m:
        assert_equal(by_kernel, snapshot(m.mnt), labels=("kernel", "layerfs"))
