"""Redirects that a layer's author wrote: they lead to directories of the layers below, or nowhere.

Each value stands on a directory of the upper, on one of the top lower, and on metadata-only files of both.
The same layers are shown by kernel overlayfs: where it answers with an error so does layerfs, where it shows
something layerfs shows the same, apart from the differences that `KERNEL_DIFFERS` gives reasons for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.stack import Stack

from .conftest import Box, assert_alive, content, err, fill, make_canary, mark, names, walk


@dataclass(frozen=True)
class Value:
    name: str
    value: bytes
    #: What layerfs must show of a directory with it: "EIO", "own" (nothing but what it holds itself) or
    #: "target" (and the redirect's target).
    shows: str


LONG = b"/" + b"/".join([b"n" * 200] * 15)

VALUES = [
    Value("dotdot", b"..", "EIO"),
    Value("dot", b".", "EIO"),
    Value("root", b"/", "EIO"),
    Value("abs-dotdot", b"/..", "EIO"),
    Value("abs-dot", b"/.", "EIO"),
    Value("up-to-canary", b"/../canary", "EIO"),
    Value("rel-up-to-canary", b"../canary", "EIO"),
    Value("up-inside", b"/target/../../canary", "EIO"),
    Value("dotdot-last", b"/target/..", "EIO"),
    Value("etc", b"/etc", "own"),
    Value("etc-passwd", b"/etc/passwd", "own"),
    Value("proc", b"/proc/self/cwd", "own"),
    Value("empty", b"", "EIO"),
    Value("nul", b"\0", "EIO"),
    Value("nul-inside", b"/target\0/../canary", "EIO"),
    Value("nul-at-end", b"/target\0", "target"),
    Value("double-slash", b"/target//sub", "EIO"),
    Value("two-slashes-first", b"//target", "EIO"),
    Value("slash-at-end", b"/target/", "EIO"),
    Value("slash-in-name", b"target/sub", "EIO"),
    Value("name-too-long", b"/" + b"n" * 256, "EIO"),
    Value("long", LONG, "own"),
    Value("onto-symlink", b"/to-target", "own"),
    Value("onto-symlink-out", b"/to-canary", "own"),
    Value("rel-onto-symlink-out", b"to-canary", "own"),
    Value("through-symlink", b"/to-target/sub", "own"),
    Value("through-symlink-out", b"/to-canary/sub", "own"),
    Value("through-symlink-in-dir", b"/target/out/sub", "own"),
    Value("onto-file", b"/plain", "own"),
    Value("through-file", b"/plain/sub", "own"),
    Value("onto-device", b"/device", "own"),
    Value("onto-whiteout", b"/gone", "own"),
    Value("through-whiteout", b"/gone/sub", "own"),
    Value("whiteout-name", b"/.wh.target", "own"),
    Value("dangling", b"/nowhere", "own"),
    Value("not-utf-8", b"/\xff\xfe", "own"),
    Value("newline", b"/tar\nget", "own"),
    Value("percent", b"/%s%n", "own"),
    Value("good", b"/target", "target"),
    Value("good-relative", b"target", "target"),
]

#: Where kernel overlayfs shows something else, and why layerfs does not follow.
KERNEL_DIFFERS = {
    # Taken for the name before the NUL (ovl_get_redirect_xattr handles C strings).
    "nul-inside": "the rest of the value is lost in the kernel",
    "nul": "an empty C string is looked up as such",
    "name-too-long": "not looked up at all: such a name can be nowhere",
}
#: What the kernel says of a second object that leads to one and the same lower: it has one inode for both.
SECOND = "ESTALE"


def lay_out(box: Box) -> None:
    top, bottom = box.lowers
    fill(bottom / "target", "from-target")
    fill(bottom / "target" / "sub", "from-sub")
    (bottom / "plain").write_text("plain")
    (bottom / "to-target").symlink_to("target")
    (bottom / "to-canary").symlink_to(box.canary)
    (bottom / "target" / "out").symlink_to(box.canary)
    os.mknod(bottom / "device", 0o020600, os.makedev(1, 3))
    fill(bottom / "gone" / "sub", "never")
    os.mknod(top / "gone", 0o020000, 0)
    for value in VALUES:
        for layer, where in ((box.upper, "up"), (top, "low")):
            own = fill(layer / f"{where}-{value.name}", "own")
            mark(own, "redirect", value.value)


def seen(mnt: Path) -> dict[str, list[str] | str]:
    return {
        f"{where}-{value.name}": names(mnt / f"{where}-{value.name}")
        for value in VALUES
        for where in ("up", "low")
    }


def expected(value: Value) -> list[str] | str:
    shown: dict[str, list[str] | str] = {
        "EIO": "EIO",
        "own": ["own"],
        "target": ["from-target", "out", "own", "sub"],
    }
    return shown[value.shows]


def test_directories(box: Box, kernel_overlay: None) -> None:
    lay_out(box)
    box.layers_done()
    with box.kernel() as kernel:
        by_kernel = seen(kernel.mnt)
    with box.layerfs() as m:
        by_layerfs = seen(m.mnt)
        again = walk(m.mnt)
        assert again["up-good"] == "dir" and again["plain"] == "file 5"
        assert_alive(m)
    wanted = {f"{where}-{v.name}": expected(v) for v in VALUES for where in ("up", "low")}
    # The whiteout lies beside them, and redirects of a layer are looked up in those below it.
    wanted |= {"low-onto-whiteout": ["own", "sub"], "low-through-whiteout": ["never", "own"]}
    assert by_layerfs == wanted
    different = {
        name: (by_kernel[name], by_layerfs[name])
        for name in by_layerfs
        if isinstance(by_kernel[name], str) != isinstance(by_layerfs[name], str)
        or (not isinstance(by_kernel[name], str) and by_kernel[name] != by_layerfs[name])
    }
    different = {n: d for n, d in different.items() if d[0] != SECOND}
    unknown = {n: d for n, d in different.items() if n.partition("-")[2] not in KERNEL_DIFFERS}
    assert not unknown, f"(kernel, layerfs): {unknown}"


def test_listing_holds_names_that_cannot_be_looked_up(box: Box, kernel_overlay: None) -> None:
    lay_out(box)
    box.layers_done()
    with box.kernel() as kernel:
        by_kernel = set(os.listdir(kernel.mnt))
    with box.layerfs() as m:
        assert set(os.listdir(m.mnt)) == by_kernel
        seen(m.mnt)  # now that the kernel has looked them up one by one
        assert set(os.listdir(m.mnt)) == by_kernel


def test_nothing_gets_out_by_changing_them(box: Box) -> None:
    """Everything a user may try on such directories fails or stays in the upper; the rest works."""
    lay_out(box)
    box.layers_done()
    with box.layerfs() as m:
        for name in seen(m.mnt):
            bad = m.mnt / name
            for attempt in (
                lambda p: os.mkdir(p / "new"),
                lambda p: (p / "new-file").write_text("x"),
                lambda p: (p / "secret").write_text("x"),
                lambda p: (p / "sub" / "secret").write_text("x"),
                lambda p: os.chmod(p, 0o700),
                os.utime,
                lambda p: os.setxattr(p, "user.x", b"1"),
                lambda p: os.unlink(p / "from-target"),
                lambda p: os.rename(p, p.with_name(p.name + ".moved")),
                lambda p: os.rename(p.with_name(p.name + ".moved"), p),
                os.rmdir,
                lambda p: os.rename(m.mnt / "plain", p / "plain2"),
                lambda p: os.rename(p / "plain2", m.mnt / "plain"),
            ):
                err(attempt, bad)
        walk(m.mnt)
        assert_alive(m)
        m.remount()
        walk(m.mnt)
        assert_alive(m)


def test_loops(box: Box, kernel_overlay: None) -> None:
    """Directories that lead to their own parents, to each other, and a chain down through the layers."""
    top, bottom = box.lowers
    fill(bottom / "a" / "b" / "c", "leaf")
    fill(top / "a" / "b", "top-b")
    mark(fill(box.upper / "self"), "redirect", b"/self")
    mark(fill(box.upper / "one"), "redirect", b"/two")
    mark(fill(box.upper / "two"), "redirect", b"/one")
    mark(fill(top / "two"), "redirect", b"/one")
    mark(fill(top / "one"), "redirect", b"/two")
    fill(bottom / "one", "bottom-one")
    fill(bottom / "two", "bottom-two")
    # A child that shows its own parent: the kernel and we see a finite tree, since redirects lead only down.
    mark(fill(box.upper / "a" / "b"), "redirect", b"/a")
    box.layers_done()
    with box.kernel() as kernel:
        by_kernel = walk(kernel.mnt)
    with box.layerfs() as m:
        by_layerfs = walk(m.mnt)
        assert_alive(m)
    # The kernel has one inode for a/b and a, and refuses the loop; with a node of its own it is finite.
    assert by_kernel.pop("a/b") in ("ESTALE", "ELOOP")
    assert by_layerfs["a/b/b/c"] == "dir" and by_layerfs["a/b/b/top-b"] == "file 5"
    assert {path: what for path, what in by_layerfs.items() if not path.startswith("a/b")} == by_kernel


@pytest.mark.parametrize("layer", ["upper", "lower"])
def test_sixty_four_kilobytes(root: None, kernel_overlay: None, layer: str) -> None:
    """The longest xattr there is (on tmpfs; ext4 takes no more than a block)."""
    base = Stack(name="base", n_lowers=0)
    mounts.mount("none", base.mnt, "tmpfs")
    try:
        stack = Stack(base=base.mnt, n_lowers=2)
        canary = make_canary(stack.dir / "canary")
        for name, value in (
            ("many", b"/x" * (1 << 15)),
            ("up", b"/.." * 21845),
            ("one", b"n" * (1 << 16)),
            ("slashes", b"/" * (1 << 16)),
            ("nuls", b"\0" * (1 << 16)),
            ("good-nuls", b"/target" + b"\0" * 60000),
        ):
            where = stack.upper if layer == "upper" else stack.lowers[0]
            assert where is not None
            mark(fill(where / name, "own"), "redirect", value)
            (where / f"{name}-file").write_text("")
            os.truncate(where / f"{name}-file", 10)
            mark(where / f"{name}-file", "redirect", value)
            mark(where / f"{name}-file", "metacopy", b"")
        fill(stack.lowers[1] / "target", "from-target")
        with mounts.Layerfs(stack) as m:
            found = walk(m.mnt)
            for name in ("many", "up", "one", "slashes", "nuls"):
                assert names(m.mnt / name) == "EIO", (name, found)
                assert content(m.mnt / f"{name}-file") == "EIO"
            assert_alive(m)
        assert content(canary / "secret") and stack.lowers[1].is_dir()
    finally:
        mounts.umount(base.mnt)
        base.remove()


def test_files(box: Box, kernel_overlay: None) -> None:
    """Metadata-only files whose redirect leads anywhere but to a regular file with data below."""
    lay_out(box)
    top, bottom = box.lowers
    (bottom / "data").write_bytes(b"0123456789")
    (bottom / "target" / "data").write_bytes(b"abcdefghij")
    # One that is itself metadata only and ends nowhere.
    (bottom / "no-data").write_bytes(b"")
    os.truncate(bottom / "no-data", 10)
    mark(bottom / "no-data", "metacopy")
    values = [(v.name, v.value) for v in VALUES] + [
        ("data", b"/data"),
        ("data-below", b"/target/data"),
        ("data-relative", b"data"),
        ("no-data", b"/no-data"),
        ("symlink-to-data", b"/to-data"),
        ("secret-through-link", b"/to-canary/secret"),
        ("secret-up", b"/../canary/secret"),
    ]
    (bottom / "to-data").symlink_to("data")
    for name, value in values:
        for layer, where in ((box.upper, "upf"), (top, "lowf")):
            file = layer / f"{where}-{name}"
            file.write_bytes(b"")
            os.truncate(file, 10)
            mark(file, "redirect", value)
            mark(file, "metacopy")
    box.layers_done()
    good = {
        "data": b"0123456789",
        "data-relative": b"0123456789",
        "data-below": b"abcdefghij",
        "onto-file": b"plain",
    }

    def read(mnt: Path) -> dict[str, bytes | str]:
        return {f"{w}-{n}": content(mnt / f"{w}-{n}") for n, _ in values for w in ("upf", "lowf")}

    with box.kernel() as kernel:
        by_kernel = read(kernel.mnt)
    with box.layerfs() as m:
        by_layerfs = read(m.mnt)
        walk(m.mnt)
        for name in by_layerfs:
            # Writing needs the data: it fails as reading did, or changes the upper's file alone.
            err(lambda p: open(p, "r+b").write(b"X"), m.mnt / name)
            err(os.truncate, m.mnt / name, 3)
            err(os.rename, m.mnt / name, m.mnt / (name + "2"))
            err(os.chmod, m.mnt / (name + "2"), 0o600)
            err(os.link, m.mnt / (name + "2"), m.mnt / (name + "3"))
            err(os.unlink, m.mnt / (name + "2"))
        walk(m.mnt)
        assert_alive(m)
    assert {n: d for n, d in by_layerfs.items() if not isinstance(d, str)} == {
        f"{where}-{name}": data for name, data in good.items() for where in ("upf", "lowf")
    }
    assert {d for d in by_layerfs.values() if isinstance(d, str)} == {"EIO"}
    assert {n for n, d in by_kernel.items() if isinstance(d, bytes) or d == SECOND} == {
        n for n, d in by_layerfs.items() if isinstance(d, bytes)
    }
