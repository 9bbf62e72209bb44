"""Marks that a layer's author wrote: metacopy, opaque, origin, inode numbers, the marks of other tools.

They are hidden, ignored or answered with EIO; no file is shown under another's name.
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.stack import Stack
from tests.support.tree import assert_equal, snapshot

from .conftest import Box, assert_alive, content, err, fill, mark, names, walk

NO_DRIVER = os.makedev(240, 4077)  # from the range for local use: opening it gives ENXIO


# --- metacopy -------------------------------------------------------------------------------------


def test_metacopy_without_data(box: Box, kernel_overlay: None) -> None:
    """In the upper, in a middle layer, in the lowest; over nothing, a directory, a symlink out, a device."""
    top, bottom = box.lowers
    fill(bottom / "over-dir")
    (bottom / "over-link").symlink_to(box.canary / "secret")
    os.mknod(bottom / "over-dev", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.mknod(bottom / "over-whiteout", stat.S_IFCHR, 0)
    os.mkfifo(bottom / "over-fifo")
    kinds = ["over-dir", "over-link", "over-dev", "over-fifo", "over-whiteout", "over-nothing"]
    for layer, prefix in ((box.upper, ""), (top, "")):
        for kind in kinds:
            file = layer / (prefix + kind)
            if layer is top and kinds.index(kind) % 2:
                continue
            file.write_bytes(b"")
            os.truncate(file, 4096)
            mark(file, "metacopy", b"" if kind != "over-dev" else b"\xff" * 40)
    (bottom / "lowest").write_bytes(b"own data")
    mark(bottom / "lowest", "metacopy")
    box.layers_done()
    everything = [*kinds, "lowest"]
    with box.kernel() as kernel:
        by_kernel = {name: content(kernel.mnt / name) for name in everything}
    with box.layerfs() as m:
        for name in everything:
            assert content(m.mnt / name) == "EIO", name
            for attempt in (
                lambda p: open(p, "ab").write(b"x"),
                lambda p: os.chmod(p, 0o600),
                lambda p: os.rename(p, str(p) + ".new"),
                lambda p: os.rename(str(p) + ".new", p),
                lambda p: os.link(p, str(p) + ".link"),
                lambda p: os.setxattr(p, "user.a", b"b"),
                lambda p: os.truncate(p, 5000),
            ):
                err(attempt, m.mnt / name)
        # Cutting it off needs no data: then it is an ordinary file. Removing needs none either.
        assert err(os.truncate, m.mnt / "over-nothing", 0) is None
        assert content(m.mnt / "over-nothing") == b""
        for name in everything:
            assert err(os.unlink, m.mnt / name) is None, name
        walk(m.mnt)
        assert_alive(m)
    assert not [n for n, data in by_kernel.items() if isinstance(data, bytes) and any(data)]


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_metacopy_on_what_has_no_data(box: Box, kernel_overlay: None, where: str) -> None:
    """A directory, a symlink, a device, a fifo: the mark means nothing on them, as for the kernel."""
    layer = box.upper if where == "upper" else box.lowers[0]
    fill(layer / "dir", "f")
    (layer / "link").symlink_to("dir")
    os.mknod(layer / "dev", stat.S_IFCHR | 0o600, NO_DRIVER)
    os.link(layer / "dev", layer / "dev-too")
    os.mkfifo(layer / "fifo")
    os.link(layer / "fifo", layer / "fifo-too")
    for name in ("dir", "link", "dev", "fifo"):
        mark(layer / name, "metacopy")
    if where == "lower":
        box.layers_done()
    with box.kernel() as kernel:
        by_kernel = walk(kernel.mnt)
    with box.layerfs() as m:
        assert walk(m.mnt) == by_kernel
        for name in ("dir", "link", "dev", "fifo"):
            assert err(os.chown, m.mnt / name, 1, 2, follow_symlinks=False) is None, name
            assert err(os.rename, m.mnt / name, m.mnt / "moved") is None, name
            if name != "dir":
                assert err(os.link, m.mnt / "moved", m.mnt / "linked", follow_symlinks=False) is None, name
                os.unlink(m.mnt / "linked")
            os.rename(m.mnt / "moved", m.mnt / name)
        before = snapshot(m.mnt)
        m.remount()
        assert_equal(before, snapshot(m.mnt))
        assert_alive(m)


def test_a_device_of_a_layer_is_not_opened(box: Box) -> None:
    """Whatever is done to it, short of a user opening it: the daemon never does."""
    os.mknod(box.upper / "dev", stat.S_IFCHR | 0o600, NO_DRIVER)
    os.link(box.upper / "dev", box.upper / "dev-too")
    mark(box.upper / "dev", "metacopy")
    os.mknod(box.lowers[0] / "low", stat.S_IFCHR | 0o600, NO_DRIVER)
    mark(box.lowers[0] / "low", "metacopy")
    box.layers_done()
    with box.layerfs() as m:
        for name in ("dev", "low"):
            path = m.mnt / name
            for attempt in (
                lambda p: os.link(p, str(p) + ".link"),
                lambda p: os.chmod(p, 0o640),
                os.utime,
                lambda p: os.setxattr(p, "trusted.x", b"y"),
                lambda p: os.rename(p, str(p) + ".new"),
                lambda p: os.unlink(str(p) + ".new"),
            ):
                assert err(attempt, path) is None
        assert_alive(m)


def test_metacopy_of_another_size(box: Box, kernel_overlay: None) -> None:
    """The upper's size counts; what the data do not have is not there (and never somebody else's)."""
    (box.lowers[0] / "longer").write_bytes(b"0123456789" * 1000)
    (box.lowers[0] / "shorter").write_bytes(b"0123456789")
    for name, size in (("longer", 100), ("shorter", 100_000)):
        (box.upper / name).write_bytes(b"")
        os.truncate(box.upper / name, size)
        mark(box.upper / name, "metacopy")
    box.layers_done()
    with box.layerfs() as m:
        for name in ("longer", "shorter"):
            data = content(m.mnt / name)
            assert isinstance(data, bytes) and data.strip(b"\0").startswith(b"0123456789")
            with open(m.mnt / name, "ab") as file:
                file.write(b"end")
            data = content(m.mnt / name)
            assert isinstance(data, bytes) and data.startswith(b"0123456789")
        assert_alive(m)


# --- opaque ---------------------------------------------------------------------------------------

OPAQUE_NONSENSE = [b"", b"n", b"Y", b"yes", b"y\0", b"1", b"\0", b"yy", b"x ", b"y" * 3000]


def test_opaque_values(box: Box, kernel_overlay: None) -> None:
    """Only `y` hides what lies below; `x` and nonsense hide nothing."""
    top, bottom = box.lowers
    values = {f"v{i}": value for i, value in enumerate([*OPAQUE_NONSENSE, b"y", b"x"])}
    for name, value in values.items():
        for layer in (box.upper, top):
            where = fill(layer / (("up-" if layer is box.upper else "low-") + name), "own")
            mark(where, "opaque", value)
            fill(bottom / where.name, "below")
    box.layers_done()
    with box.kernel() as kernel:
        by_kernel = {n: names(kernel.mnt / n) for n in sorted(os.listdir(kernel.mnt))}
    with box.layerfs() as m:
        by_layerfs = {n: names(m.mnt / n) for n in sorted(os.listdir(m.mnt))}
        assert_alive(m)
    assert by_layerfs == by_kernel
    hidden = {n for n, listed in by_layerfs.items() if listed == ["own"]}
    assert {n.partition("-")[2] for n in hidden} == {n for n, v in values.items() if v == b"y"}


def test_opaque_on_files_and_the_root(box: Box, kernel_overlay: None) -> None:
    """On anything but a directory it means nothing. An opaque root hides all lowers, as for the kernel."""
    (box.upper / "file").write_text("upper")
    mark(box.upper / "file", "opaque", b"y")
    (box.lowers[0] / "file").write_text("lower")
    (box.lowers[0] / "link").symlink_to("file")
    mark(box.lowers[0] / "link", "opaque", b"y")
    fill(box.lowers[1] / "link", "never")
    box.layers_done()
    with box.kernel() as kernel:
        by_kernel = walk(kernel.mnt)
    with box.layerfs() as m:
        assert walk(m.mnt) == by_kernel
        os.unlink(m.mnt / "file")
        assert not (m.mnt / "file").exists()
        assert_alive(m)


# --- marks of others ------------------------------------------------------------------------------

FOREIGN = {
    "user.fuseoverlayfs.opaque": b"y",
    "user.fuseoverlayfs.origin": b"/../canary/secret",
    "user.fuseoverlayfs.override_stat": b"0:0:04777",
    "user.containers.override_stat": b"0:0:0104755:file",
    "trusted.overlay.upper": b"\0\xfb" + b"\xff" * 30,
    "trusted.overlay.uuid": b"u" * 16,
    "trusted.overlay.protattr": b"ai",
    "trusted.overlay.impure": b"nonsense",
    "trusted.overlay.nlink": b"U+99999999999999",
    "trusted.overlay.verity": b"v",
    "trusted.overlay.unheard-of": b"?",
    "trusted.overlay.layerfs.unheard-of": b"?",
}
#: Marks of the other kind of mount are anybody's xattrs in this one, shown as the kernel shows them.
OTHER_KIND = {
    "user.overlay.opaque": b"y",
    "user.overlay.redirect": b"/../canary",
    "user.overlay.metacopy": b"",
    "user.overlay.origin": b"\0\xfb",
    "user.overlay.whiteout": b"",
}


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_marks_of_others_are_hidden_and_ignored(box: Box, where: str) -> None:
    layer = box.upper if where == "upper" else box.lowers[0]
    fill(box.lowers[1] / "dir", "below")
    for name, value in FOREIGN.items():
        on_file, on_dir = layer / f"f-{name}", fill(layer / f"d-{name}", "inside")
        on_file.write_text("data")
        os.chmod(on_file, 0o640)
        for each in (on_file, on_dir):
            os.setxattr(each, name, value)
            os.setxattr(each, "user.mine", b"shown")
    if where == "lower":
        box.layers_done()
    with box.layerfs() as m:
        for name in FOREIGN:
            for kind in "fd":
                path = m.mnt / f"{kind}-{name}"
                assert os.listxattr(path) == ["user.mine"], name
                assert err(os.getxattr, path, name) in ("ENODATA", "EPERM", "EOPNOTSUPP")
                status = os.stat(path)
                assert status.st_uid == 0 and stat.S_IMODE(status.st_mode) in (0o640, 0o755)
                assert status.st_nlink < 10
            assert content(m.mnt / f"f-{name}") == b"data"
            assert names(m.mnt / f"d-{name}") == ["inside"]
            # A copy-up does not take them along, or make them work.
            os.chmod(m.mnt / f"f-{name}", 0o600)
            os.rename(m.mnt / f"d-{name}", m.mnt / f"moved-{name}")
            assert names(m.mnt / f"moved-{name}") == ["inside"]
        m.remount()
        for name in FOREIGN:
            assert content(m.mnt / f"f-{name}") == b"data"
            assert os.listxattr(m.mnt / f"f-{name}") == ["user.mine"]
            assert names(m.mnt / f"moved-{name}") == ["inside"]
        assert_alive(m)


def test_marks_of_the_other_kind_do_nothing(box: Box, kernel_overlay: None) -> None:
    """In the upper. (In a lower, `user.overlay.opaque` counts: layers of ordinary users' mounts carry it.)"""
    for name, value in OTHER_KIND.items():
        (box.upper / f"f-{name}").write_text("data")
        (box.upper / f"e-{name}").write_text("")
        fill(box.upper / f"d-{name}", "inside")
        fill(box.lowers[0] / f"d-{name}", "below")
        for kind in "fed":
            os.setxattr(box.upper / f"{kind}-{name}", name, value)
    box.layers_done()

    def look(mnt: Path) -> dict[str, object]:
        found: dict[str, object] = dict(walk(mnt))
        for path in sorted(os.listdir(mnt)):
            found[f"xattrs of {path}"] = {x: os.getxattr(mnt / path, x) for x in os.listxattr(mnt / path)}
        return found

    with box.kernel() as kernel:
        by_kernel = look(kernel.mnt)
    with box.layerfs() as m:
        assert look(m.mnt) == by_kernel
        assert_alive(m)


# --- inode numbers and origins --------------------------------------------------------------------

TEMPORARY = 1 << 62
NUMBERS = {
    "zero": b"0",
    "one": b"1",
    "two": b"2",
    "temporary1": b"%d" % (TEMPORARY + 1),
    "temporary2": b"%d" % (TEMPORARY + 2),
    "temporary3": b"%d" % (TEMPORARY + 3),
    "same1": b"281474976720000",
    "same2": b"281474976720000",
    "same3": b"281474976720000",
    "largest": b"%d" % ((1 << 64) - 1),
    "too-large": b"%d" % (1 << 64),
    "huge": b"9" * 19,
    "very-huge": b"9" * 3000,
    "half": b"%d" % (1 << 63),
    "negative": b"-5",
    "hex": b"0x10",
    "spaces": b" 12345 ",
    "arabic": "١٢٣".encode(),
    "empty": b"",
    "nul": b"\0",
    "binary": bytes(range(200)),
}


def test_absurd_numbers(box: Box) -> None:
    """Files and directories of the upper claim any number: each is shown once, as itself, under a number of
    its own.
    """
    mark(box.upper, "impure", b"y")
    (box.lowers[0] / "lower-file").write_text("lower-file")
    inside = os.stat(box.lowers[0] / "lower-file").st_ino
    wanted = dict(NUMBERS)
    wanted["as-lower"] = b"%d" % (2 << 48 | inside)
    wanted["as-lower-too"] = b"%d" % (2 << 48 | inside)
    wanted["as-own-dir"] = b"%d" % os.stat(box.upper).st_ino
    for name, value in wanted.items():
        (box.upper / name).write_text(name)
        mark(box.upper / name, "layerfs.ino", value)
        mark(fill(box.upper / f"d-{name}", f"in-{name}"), "layerfs.ino", value)
    box.layers_done()
    with box.layerfs() as m:
        # All in use at one time, in an order that gives temporary numbers away before they are claimed.
        order = sorted(wanted, key=lambda n: (not n.startswith("same"), n))
        fds = {name: os.open(m.mnt / name, os.O_RDONLY) for name in [*order, "lower-file"]}
        try:
            for name, fd in fds.items():
                assert os.pread(fd, 99, 0).decode() == name
            assert len({os.fstat(fd).st_ino for fd in fds.values()}) == len(fds)
        finally:
            for fd in fds.values():
                os.close(fd)
        for name in order:
            assert content(m.mnt / name) == name.encode()
            assert names(m.mnt / f"d-{name}") == [f"in-{name}"]
            assert os.stat(m.mnt / name).st_ino > 0
        assert set(os.listdir(m.mnt)) == {*wanted, *(f"d-{n}" for n in wanted), "lower-file"}
        for name in order:
            (m.mnt / name).write_text(name + " changed")
        for name in order:
            assert content(m.mnt / name) == f"{name} changed".encode()
            assert (box.upper / name).read_text() == f"{name} changed"
        for name in order:
            os.unlink(m.mnt / name)
            assert names(m.mnt / f"d-{name}") == [f"in-{name}"]
        assert content(m.mnt / "lower-file") == b"lower-file"
        assert_alive(m)


def origins() -> dict[str, bytes]:
    def value(handle: bytes, kind: int = 1, *, magic: int = 0xFB, length: int | None = None) -> bytes:
        size = 21 + len(handle) if length is None else length
        return struct.pack("=BBBBB16s", 0, magic, size & 0xFF, 0, kind, b"u" * 16) + handle

    return {
        "empty": b"",
        "short": b"\0\xfb",
        "bad-magic": value(b"12345678", magic=0xFA),
        "bad-length": value(b"12345678", length=3),
        "zeros": bytes(29),
        "ino-one": value(struct.pack("=II", 1, 0)),
        "ino-max": value(b"\xff" * 8),
        "xfs-max": value(b"\xff" * 16, 0x81),
        "btrfs-max": value(b"\xff" * 20, 0x4D),
        "tmpfs-max": value(b"\xff" * 12),
        "odd-size": value(b"\xff" * 7),
        "no-handle": value(b""),
        "long": value(b"\xff" * 200),
        "random": os.urandom(64),
    }


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_origins_of_nonsense(box: Box, where: str) -> None:
    """Never opened; at worst the number is another one. A handle of the canary's files leads nowhere."""
    layer = box.upper if where == "upper" else box.lowers[0]
    values = origins()
    handle = subprocess.run(
        ["stat", "-c", "%i", box.canary / "secret"], check=True, capture_output=True, text=True
    )
    values["of-canary"] = struct.pack("=BBBBB16s", 0, 0xFB, 29, 0, 1, b"u" * 16) + struct.pack(
        "=II", int(handle.stdout), 0
    )
    mark(layer, "impure", b"y")
    for name, value in values.items():
        (layer / name).write_text(name)
        mark(layer / name, "origin", value)
        mark(fill(layer / f"d-{name}", "inside"), "origin", value)
    if where == "lower":
        box.layers_done()
    with box.layerfs() as m:
        found = walk(m.mnt)
        for name in values:
            assert content(m.mnt / name) == name.encode()
            assert found[f"d-{name}/inside"] == "file 6"
        numbers = [os.stat(m.mnt / n).st_ino for n in os.listdir(m.mnt)]
        assert len(set(numbers)) == len(numbers)
        assert_alive(m)


# --- several file systems in one layer ------------------------------------------------------------


def test_inode_numbers_that_repeat_in_one_layer(root: None) -> None:
    """btrfs subvolumes in a lower: files of the same inode number, in different ones, are different files."""
    base = Stack(name="base", n_lowers=0)
    image = base.dir / "btrfs.img"
    with open(image, "wb") as file:
        file.truncate(256 << 20)
    if subprocess.run(["mkfs.btrfs", "-q", image], check=False, capture_output=True).returncode:
        pytest.skip("no mkfs.btrfs")
    if subprocess.run(["mount", "-o", "loop", image, base.mnt], check=False, capture_output=True).returncode:
        pytest.skip("no loop mount of a btrfs here")
    try:
        stack = Stack(base=base.mnt)
        for layer in (stack.lowers[0], stack.upper):
            assert layer is not None
            for name in ("one", "two"):
                sub = layer / f"{layer.name}-{name}"
                subprocess.run(["btrfs", "-q", "subvolume", "create", sub], check=True, capture_output=True)
                (sub / "f").write_text(sub.name)
                os.link(sub / "f", sub / "f-too")
                fill(sub / "d", sub.name)
        with mounts.Layerfs(stack) as m:
            subs = sorted(os.listdir(m.mnt))
            files = [m.mnt / sub / name for sub in subs for name in ("f", "f-too")]
            fds = [os.open(file, os.O_RDONLY) for file in files]
            read = [os.pread(fd, 99, 0).decode() for fd in fds]
            held = [os.fstat(fd).st_ino for fd in fds]
            for fd in fds:
                os.close(fd)
            assert read == [file.parent.name for file in files]
            assert len(set(held)) == len(subs), "one number for two names, another for each file"
            assert [names(m.mnt / sub / "d") for sub in subs] == [[sub] for sub in subs]
            (m.mnt / subs[0] / "f").write_text("changed")
            assert [content(f) for f in files[:2]] == [b"changed"] * 2
            assert [content(f) for f in files[2:]] == [f.parent.name.encode() for f in files[2:]]
    finally:
        mounts.umount(base.mnt)
        base.remove()


def test_a_file_system_mounted_in_the_upper(box: Box) -> None:
    """Not part of the layer. Shown or not, no file of it is taken for another's."""
    for name in ("one", "two"):
        mounts.mount("none", fill(box.upper / name), "tmpfs")
        (box.upper / name / "f").write_text(name)
    box.layers_done()
    try:
        with box.layerfs() as m:
            fds = {}
            for name in ("one", "two"):
                try:
                    fds[name] = os.open(m.mnt / name / "f", os.O_RDONLY)
                except OSError:
                    continue
            for name, fd in fds.items():
                assert os.read(fd, 9).decode() == name
                os.close(fd)
            for name in ("one", "two"):
                err((m.mnt / name / "new").write_text, "x")
                err(os.rename, m.mnt / name / "f", m.mnt / f"out-{name}")
            assert_alive(m)
    finally:
        for name in ("one", "two"):
            mounts.umount(box.upper / name)


def test_lower_deeper_than_path_max(box: Box) -> None:
    """A tree that can only be walked step by step, as on a plain directory."""
    depth, part = 50, "n" * 100
    here = os.open(box.lowers[0], os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(part, dir_fd=here)
        below = os.open(part, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=here))
    os.close(here)
    with box.layerfs() as m:
        here = os.open(m.mnt, os.O_RDONLY)
        for _ in range(depth):
            below = os.open(part, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        assert os.listdir(here) == ["leaf"]
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=here))
        os.rename("leaf", "moved", src_dir_fd=here, dst_dir_fd=here)
        os.close(here)
        m.remount()
        here = os.open(m.mnt, os.O_RDONLY)
        for _ in range(depth):
            below = os.open(part, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        assert sorted(os.listdir(here)) == ["moved", "new"]
        os.close(here)


def test_unreadable_parts_do_not_spoil_the_rest(
    ordinary_user: tuple[int, int], make_stack: type[Stack]
) -> None:
    """Somebody who may not read all of a lower still sees the hard-linked files that he may read."""
    stack = make_stack(n_lowers=2, owner=ordinary_user)
    assert stack.upper is not None
    for name in ("a", "b"):
        if name == "a":
            (stack.lowers[1] / "a").write_text("linked")
        else:
            os.link(stack.lowers[1] / "a", stack.lowers[1] / "b")
    os.mkdir(stack.lowers[1] / "locked", 0)
    (stack.upper / "not-empty").touch()
    with mounts.Layerfs(stack, as_user=ordinary_user) as m:
        done = m.run("stat", "-c", "%h", str(m.mnt / "a"), str(m.mnt / "b"))
        assert (done.stdout, done.stderr) == ("2\n2\n", "")
        assert m.run("cat", str(m.mnt / "a")).stdout == "linked"


def test_prefix_of_the_other_kind(ordinary_user: tuple[int, int], make_stack: type[Stack]) -> None:
    """An ordinary user's mount goes by `user.` marks; what a layer's author wrote there is bounded too."""
    stack = make_stack(n_lowers=2, owner=ordinary_user, prefix="user.overlay.")
    assert stack.upper is not None
    canary = stack.dir / "canary"
    fill(canary, "secret")
    for i, value in enumerate([b"..", b"/../canary", b"/", b"", b"/target", b"x" * 3000]):
        for layer in (stack.upper, stack.lowers[0]):
            where = fill(layer / f"{layer.name}-{i}", "own")
            os.setxattr(where, "user.overlay.redirect", value)
            file = layer / f"{layer.name}-f{i}"
            file.write_text("")
            os.setxattr(file, "user.overlay.redirect", value)
            os.setxattr(file, "user.overlay.metacopy", b"")
    fill(stack.lowers[1] / "target", "from-target")
    for each in (stack.upper, *stack.lowers):
        subprocess.run(["chown", "-R", f"{ordinary_user[0]}:{ordinary_user[1]}", each], check=True)
    with mounts.Layerfs(stack, as_user=ordinary_user) as m:
        done = m.run("find", str(m.mnt), "-printf", "%P\\n")
        assert "secret" not in done.stdout
        assert "upper-4/from-target" in done.stdout and "lower0-4/from-target" in done.stdout
        m.run("sh", "-c", f"cat {m.mnt}/*; touch {m.mnt}/*/new; rm -rf {m.mnt}/*")
        assert m.run("touch", str(m.mnt / "alive")).returncode == 0
    assert os.listdir(canary) == ["secret"]


@pytest.mark.long
def test_thousands_of_levels(box: Box) -> None:
    """Deeper than Python's stack: made, renamed as a whole with and without marks, remounted, removed."""
    depth = 1500

    def descend(root: Path, make: bool) -> int:
        here = os.open(root, os.O_RDONLY)
        count = 0
        while True:
            if make:
                if count == depth:
                    break
                os.mkdir("d", dir_fd=here)
            try:
                below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            except FileNotFoundError:
                break
            os.close(here)
            here = below
            count += 1
        os.close(here)
        return count

    fill(box.lowers[0] / "deep")
    assert descend(box.lowers[0] / "deep", True) == depth
    fill(box.lowers[0] / "deep2")
    assert descend(box.lowers[0] / "deep2", True) == depth
    with box.layerfs() as m:
        assert descend(m.mnt / "deep", False) == depth
        os.rename(m.mnt / "deep", m.mnt / "renamed")
        assert descend(m.mnt / "renamed", False) == depth
        assert subprocess.run(["rm", "-rf", m.mnt / "renamed"], check=False).returncode == 0
        assert_alive(m)
    with box.layerfs("redirect_dir=off,metacopy=off") as m:
        os.rename(m.mnt / "deep2", m.mnt / "renamed2")
        assert descend(m.mnt / "renamed2", False) == depth
        assert_alive(m)
