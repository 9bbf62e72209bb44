"""What users of a mount may not do: make marks and whiteouts. What they may: nest overlays in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.stack import Stack
from tests.support.tree import assert_equal, snapshot

from .conftest import Box, P, assert_alive, content, err, fill, names

OWN = [
    "opaque",
    "redirect",
    "metacopy",
    "origin",
    "impure",
    "nlink",
    "whiteout",
    "protattr",
    "layerfs.ino",
    "any",
]


TARGETS = ["upper-file", "lower-file", "upper-dir", "lower-dir", "lower-link"]


def own_xattrs(mnt: Path) -> dict[str, dict[str, bytes]]:
    return {
        target: {
            n: os.getxattr(mnt / target, n, follow_symlinks=False)
            for n in os.listxattr(mnt / target, follow_symlinks=False)
        }
        for target in TARGETS
    }


def test_own_marks_are_escaped(box: Box, kernel_overlay: None) -> None:
    """Set through the mount, `trusted.overlay.X` is a user's xattr like any other, one level down on disk: as
    under the kernel, which reads back what layerfs wrote and the reverse. It marks nothing.
    """
    for layer, name in ((box.upper, "upper"), (box.lowers[0], "lower")):
        (layer / f"{name}-file").write_text("data")
        fill(layer / f"{name}-dir", "inside")
        (layer / f"{name}-link").symlink_to("target")
    fill(box.lowers[1] / "lower-dir", "below")
    box.layers_done()

    def put(path: Path, name: str, value: bytes) -> None:
        os.setxattr(path, P + name, value, follow_symlinks=False)

    with box.layerfs() as m:
        for target in TARGETS:
            for name in OWN:
                put(m.mnt / target, name, f"by layerfs {name}".encode())
            put(m.mnt / target, "overlay.opaque", b"y")
            put(m.mnt / target, "opaque", b"y")
            put(m.mnt / target, "redirect", b"/../canary")
            os.removexattr(m.mnt / target, P + "any", follow_symlinks=False)
        wanted = own_xattrs(m.mnt)
        assert all(len(each) == len(OWN) and each[P + "overlay.opaque"] == b"y" for each in wanted.values())
        look = snapshot(m.mnt)
        for _ in range(2):
            assert own_xattrs(m.mnt) == wanted
            assert_equal(look, snapshot(m.mnt))
            assert names(m.mnt / "lower-dir") == ["below", "inside"]
            assert names(m.mnt / "upper-dir") == ["inside"]
            assert content(m.mnt / "lower-file") == content(m.mnt / "upper-file") == b"data"
            m.remount()
        assert_alive(m)
    with box.kernel() as kernel:
        assert own_xattrs(kernel.mnt) == wanted
        for target in TARGETS:
            put(kernel.mnt / target, "opaque", b"by the kernel")
            put(kernel.mnt / target, "overlay.overlay.x", b"deep")
            os.removexattr(kernel.mnt / target, P + "overlay.opaque", follow_symlinks=False)
        wanted = own_xattrs(kernel.mnt)
    with box.layerfs() as m:
        assert own_xattrs(m.mnt) == wanted


def test_marks_of_other_tools_are_refused(box: Box) -> None:
    (box.upper / "f").write_text("f")
    fill(box.lowers[0] / "d")
    box.layers_done()
    with box.layerfs() as m:
        for name in (
            "user.fuseoverlayfs.opaque",
            "user.fuseoverlayfs.origin",
            "user.fuseoverlayfs.override_stat",
            "user.containers.override_stat",
        ):
            for path in (m.mnt / "f", m.mnt / "d"):
                assert err(os.setxattr, path, name, b"y") in ("EPERM", "EOPNOTSUPP")
                assert err(os.removexattr, path, name) in ("EPERM", "ENODATA")
                assert os.listxattr(path) == []
        assert_alive(m)
    assert os.listdir(box.upper) == ["f"] and not os.listxattr(box.upper / "f")


@pytest.mark.parametrize("prefix", ["trusted.overlay.", "user.overlay."])
def test_no_mark_takes_effect(box: Box, prefix: str) -> None:
    """Whatever a user of the mount sets, in any order with copy-ups and renames, steers nothing."""
    fill(box.lowers[0] / "d", "below")
    fill(box.lowers[1] / "d", "bottom")
    (box.lowers[0] / "f").write_text("data")
    box.layers_done()
    with box.layerfs() as m:
        for path in (m.mnt / "d", m.mnt / "f", m.mnt):
            for name, value in (
                ("opaque", b"y"),
                ("redirect", b"/f"),
                ("metacopy", b""),
                ("whiteout", b""),
                ("impure", b"y"),
                ("layerfs.ino", b"1"),
                ("origin", b"\0" * 29),
            ):
                os.setxattr(path, prefix + name, value)
        for _ in range(2):
            assert names(m.mnt) == ["d", "f"]
            assert names(m.mnt / "d") == ["below", "bottom"]
            assert content(m.mnt / "f") == b"data"
            m.remount()
        os.rename(m.mnt / "d", m.mnt / "e")
        os.rename(m.mnt / "f", m.mnt / "g")
        m.remount()
        assert names(m.mnt / "e") == ["below", "bottom"]
        assert content(m.mnt / "g") == b"data"
        assert os.getxattr(m.mnt / "g", prefix + "redirect") == b"/f"
        assert_alive(m)


def test_mknod_of_a_whiteout_is_refused(box: Box, kernel_overlay: None) -> None:
    (box.lowers[0] / "f").write_text("f")
    box.layers_done()

    def attempts(mnt: Path) -> list[str | None]:
        return [
            err(os.mknod, mnt / "new", stat.S_IFCHR | mode, device)
            for mode in (0, 0o666)
            for device in (0, os.makedev(0, 0))
        ]

    with box.kernel() as kernel:
        by_kernel = attempts(kernel.mnt)
    with box.layerfs() as m:
        assert attempts(m.mnt) == by_kernel == ["EPERM"] * 4
        assert err(os.mknod, m.mnt / "f", stat.S_IFCHR, 0) in ("EEXIST", "EPERM")
        # Its neighbours are ordinary.
        os.mknod(m.mnt / "block", stat.S_IFBLK | 0o600, 0)
        os.mknod(m.mnt / "char", stat.S_IFCHR | 0o600, os.makedev(0, 1))
        assert names(m.mnt) == ["block", "char", "f"]
        os.unlink(m.mnt / "block")
        os.unlink(m.mnt / "char")
        assert_alive(m)


def test_rename_whiteout_flag_is_refused(box: Box) -> None:
    from layerfs.fdutil import RENAME_WHITEOUT, renameat2

    (box.upper / "f").write_text("f")
    box.layers_done()
    with box.layerfs() as m:
        fd = os.open(m.mnt, os.O_RDONLY)
        try:
            assert err(renameat2, fd, b"f", fd, b"g", RENAME_WHITEOUT) == "EINVAL"
        finally:
            os.close(fd)
        assert names(m.mnt) == ["f"]


def test_names_like_whiteouts_cannot_be_made(box: Box) -> None:
    """EINVAL, as the README says: in an image layer such a name could not be told from a whiteout."""
    (box.lowers[0] / "victim").write_text("victim")
    fill(box.lowers[0] / "dir", "f")
    box.layers_done()
    with box.layerfs() as m:
        for name in (".wh.", ".wh..", ".wh.victim", ".wh..wh..opq", ".wh..wh.plnk", ".wh.x" * 30):
            path = m.mnt / name
            for attempt in (
                lambda p: os.close(os.open(p, os.O_CREAT | os.O_WRONLY)),
                os.mkdir,
                os.mkfifo,
                lambda p: os.symlink("x", p),
                lambda p: os.mknod(p, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
                lambda p: os.link(m.mnt / "victim", p),
                lambda p: os.rename(m.mnt / "victim", p),
                lambda p: os.rename(m.mnt / "dir", p),
            ):
                assert err(attempt, path) == "EINVAL", name
            assert err(os.lstat, path) == "ENOENT"
            assert err(os.unlink, path) == err(os.rmdir, path) == "ENOENT"
            assert err(os.rename, path, m.mnt / "elsewhere") == "ENOENT"
        for name in (".wh", "wh.", ".whx", ".WH.x", "x.wh."):
            (m.mnt / name).write_text("fine")
            os.unlink(m.mnt / name)
        assert names(m.mnt) == ["dir", "victim"]
        assert_alive(m)
    assert (
        "EINVAL" in (Path(__file__).parents[2] / "README.md").read_text()
        or ".wh." in (Path(__file__).parents[2] / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "outer,inner", [("layerfs", "kernel"), ("kernel", "layerfs"), ("layerfs", "layerfs")]
)
def test_layers_of_an_overlay_made_inside_a_mount(
    root: None, kernel_overlay: None, make_stack: type[Stack], outer: str, inner: str
) -> None:
    """A nested overlay finds, in layers made through the outer mount, the marks it wrote there: opaque
    directories, redirects, and whiteouts in xattr form (devices cannot be made there).
    """
    kinds = {"layerfs": mounts.Layerfs, "kernel": mounts.KernelOverlay}
    outside = make_stack()
    with kinds[outer](outside) as mounted:
        nested = make_stack(n_lowers=0, writable=False)
        top, bottom = fill(mounted.mnt / "top"), fill(mounted.mnt / "bottom")
        fill(bottom / "opaque", "never")
        fill(bottom / "moved-from", "moved")
        (bottom / "gone").write_text("never")
        (bottom / "stays").write_text("stays")
        fill(bottom / "d", "gone", "stays")
        os.setxattr(fill(top / "opaque", "own"), P + "opaque", b"y")
        os.setxattr(fill(top / "moved-to"), P + "redirect", b"/moved-from")
        for here in (top, fill(top / "d")):
            os.setxattr(here, P + "opaque", b"x")
            (here / "gone").touch()
            os.setxattr(here / "gone", P + "whiteout", b"y")
        nested.lowers = [top, bottom]
        with kinds[inner](nested) as m:
            assert names(m.mnt) == ["d", "moved-from", "moved-to", "opaque", "stays"]
            assert names(m.mnt / "d") == ["stays"]
            assert names(m.mnt / "opaque") == ["own"]
            assert names(m.mnt / "moved-to") == ["moved"]
