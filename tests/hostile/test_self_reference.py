"""Mounts over their own layers, in each other, over layers that go away, and mounts whose daemon is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs, Mounted
from tests.support.stack import Dir, File, Hardlink, Stack, Symlink
from tests.support.tree import assert_equal, snapshot

from .conftest import Box, assert_alive, content, err, fill, names, walk

TREE = {
    "d": Dir(),
    "d/f": File(data=b"f" * 5000),
    "d/sub": Dir(),
    "d/sub/g": File(data=b"g"),
    "a": File(data=b"linked"),
    "b": Hardlink("a"),
    "l": Symlink(target="d/f"),
}


def work_in(mnt: Path) -> None:
    """A bit of everything that goes through several layers."""
    (mnt / "d" / "new").write_text("new")
    with open(mnt / "a", "ab") as file:
        file.write(b" and changed")
    assert (mnt / "b").read_bytes() == b"linked and changed"
    assert os.stat(mnt / "a").st_ino == os.stat(mnt / "b").st_ino
    os.rename(mnt / "d", mnt / "e")
    os.unlink(mnt / "e" / "sub" / "g")
    os.mkdir(mnt / "d")
    os.chmod(mnt / "e" / "f", 0o600)
    os.setxattr(mnt / "e", "user.x", b"y")
    assert names(mnt / "d") == []
    assert names(mnt / "e") == ["f", "new", "sub"]


def check_work(mnt: Path) -> None:
    assert names(mnt / "e") == ["f", "new", "sub"] and names(mnt / "d") == []
    assert content(mnt / "e" / "f") == b"f" * 5000 and content(mnt / "b") == b"linked and changed"


# --- the mount point and the layers ---------------------------------------------------------------


@pytest.mark.parametrize("place", ["top lower", "bottom lower", "inside a lower", "parent of lowers", "root"])
def test_mounted_over_its_own_layers(box: Box, place: str) -> None:
    """The layers are opened before the mount hides them."""
    outside = box.stack.dir / "elsewhere"  # upper and work must not be hidden: a mount over them is refused
    top, bottom = fill(box.stack.dir / "all" / "top"), fill(box.stack.dir / "all" / "bottom", "in-bottom")
    box.stack.write(bottom, TREE)
    fill(top, "in-top")
    fill(bottom / "inside")
    box.stack.lowers[:] = [top, bottom]
    box.stack.upper, box.stack.work = fill(outside / "upper"), fill(outside / "work")
    box.stack.mnt = {
        "top lower": top,
        "bottom lower": bottom,
        "inside a lower": bottom / "inside",
        "parent of lowers": box.stack.dir / "all",
        "root": box.stack.dir / "all",
    }[place]
    if place == "root":
        # Named through the mount point itself, by paths that change their meaning when it is mounted.
        box.stack.lowers[:] = [box.stack.mnt / "top", box.stack.mnt / ".." / "all" / "bottom"]
    before = snapshot(bottom)
    with box.layerfs() as m:
        assert {"in-top", "in-bottom", "d", "inside"} <= set(os.listdir(m.mnt))
        work_in(m.mnt)
        walk(m.mnt)
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("2")
        check_work(m.mnt)
        m.remount()
        check_work(m.mnt)
        assert_alive(m)
    assert_equal(before, snapshot(bottom))


@pytest.mark.parametrize("what", ["upper", "work", "both", "upper is it", "by symlink", "by bind mount"])
def test_upper_under_the_mount_point_is_refused(box: Box, what: str) -> None:
    inside = fill(box.mnt / "inside")
    upper, work = fill(inside / "upper"), fill(inside / "work")
    if what in ("upper", "both"):
        box.stack.upper = upper
    if what in ("work", "both"):
        box.stack.work = work
    if what == "upper is it":
        box.stack.upper = box.mnt
    if what == "by symlink":
        link = box.stack.dir / "link"
        link.symlink_to(inside)
        box.stack.upper, box.stack.work = link / "upper", link / "work"
    if what == "by bind mount":
        bound = fill(box.stack.dir / "bound")
        mounts.bind(box.mnt, bound)
        box.stack.upper, box.stack.work = upper, work
        box.stack.mnt = bound
    m = box.layerfs()
    done = m.run(*m.command())
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "inside" in done.stderr or "same" in done.stderr
    assert not [k for _, k in mounts.mounts_below(box.stack.dir) if k == "fuse.layerfs"]
    assert not m.pids() and not m.log_text()
    assert os.listdir(upper) == [] and os.listdir(work) == []


def test_upper_inside_a_live_mount_of_its_own_lowers(box: Box) -> None:
    """An upper that lies in another layerfs mount: it works there, or is refused in one line."""
    box.stack.write(box.lowers[0], TREE)
    box.layers_done()
    with box.layerfs() as outer:
        inner = Stack(n_lowers=0)
        inner.lowers = [box.lowers[0]]
        inner.upper, inner.work = fill(outer.mnt / "inner-upper"), fill(outer.mnt / "inner-work")
        m = Layerfs(inner)
        done = m.run(*m.command())
        if done.returncode:
            assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
            assert not m.pids()
        else:
            mounts.live.append(m)
            try:
                work_in(m.mnt)
                m.remount()
                check_work(m.mnt)
            finally:
                m.close()
        assert_alive(outer)
        inner.remove()


# --- over each other ------------------------------------------------------------------------------

KINDS = {"layerfs": Layerfs, "kernel": KernelOverlay}


@pytest.fixture
def under(
    root: None, kernel_overlay: None, request: pytest.FixtureRequest
) -> Iterator[tuple[Mounted, Stack]]:
    """A mount of the named kind, worked in, and a stack that has it as its middle lower."""
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)
    first, second = Stack(n_lowers=2, name="under"), Stack(n_lowers=2, name="over")
    try:
        first.write(first.lowers[0], TREE)
        fill(first.lowers[1] / "d", "from-the-bottom")
        with ExitStack() as stack:
            mounted = stack.enter_context(KINDS[request.param](first))
            (mounted.mnt / "d" / "in-upper").write_text("u")
            fill(second.lowers[0] / "d", "over")
            fill(second.lowers[1] / "d", "below")
            second.lowers.insert(1, mounted.mnt)
            yield mounted, second
    finally:
        for each in (second, first):
            subprocess.run(["rm", "-rf", each.dir], check=True)


@pytest.mark.parametrize(
    "under,over", [("layerfs", "layerfs"), ("kernel", "layerfs"), ("layerfs", "kernel")], indirect=["under"]
)
def test_a_mount_as_lower(under: tuple[Mounted, Stack], over: str) -> None:
    mounted, stack = under
    before = snapshot(mounted.mnt)
    with KINDS[over](stack) as m:
        assert names(m.mnt / "d") == ["below", "f", "from-the-bottom", "in-upper", "over", "sub"]
        a, b = os.stat(m.mnt / "a"), os.stat(m.mnt / "b")
        assert a.st_ino == b.st_ino and a.st_nlink == 2
        fd = os.open(m.mnt / "b", os.O_RDONLY)
        numbers = {p: os.lstat(m.mnt / p).st_ino for p in ("d", "d/f", "d/sub", "a", "l", "d/in-upper")}
        assert len(set(numbers.values())) == len(numbers)
        os.unlink(m.mnt / "d" / "below")
        os.unlink(m.mnt / "d" / "over")
        os.unlink(m.mnt / "d" / "from-the-bottom")
        os.unlink(m.mnt / "d" / "in-upper")
        if over == "layerfs":
            work_in(m.mnt)
            assert os.pread(fd, 99, 0) == b"linked and changed"
            os.close(fd)
            m.remount()
            check_work(m.mnt)
            moved = {p: p.replace("d", "e", 1) for p in ("d", "d/f", "d/sub", "a", "l")}
            assert {p: os.lstat(m.mnt / moved[p]).st_ino for p in moved} == {p: numbers[p] for p in moved}
            assert_alive(m)
        else:
            os.close(fd)
            os.rename(m.mnt / "d", m.mnt / "e")
            with open(m.mnt / "a", "ab") as file:
                file.write(b" and changed")
            assert content(m.mnt / "a") == b"linked and changed"
            m.remount()
            assert names(m.mnt / "e") == ["f", "sub"]
    assert_equal(before, snapshot(mounted.mnt), message="the mount below was changed")


def test_four_high(box: Box) -> None:
    """layerfs over layerfs over layerfs...: the lower of each is the mount of the one before."""
    box.stack.write(box.lowers[1], TREE)
    box.layers_done()
    with ExitStack() as stack:
        mnt = stack.enter_context(box.layerfs()).mnt
        for level in range(3):
            above = Stack(n_lowers=0, name=f"level{level}")
            stack.callback(above.remove)
            above.lowers = [mnt]
            mnt = stack.enter_context(Layerfs(above)).mnt
            (mnt / f"level{level}").write_text(str(level))
        work_in(mnt)
        assert {f"level{n}" for n in range(3)} < set(os.listdir(mnt))
        check_work(mnt)
        assert names(box.mnt / "d") == ["f", "sub"]


# --- mounts inside layers, layers that go ---------------------------------------------------------


def test_file_systems_inside_a_lower_are_not_shown(box: Box) -> None:
    """As kernel overlayfs: what is mounted inside a layer is not part of it, before or after the mount."""
    for name in ("before", "after"):
        fill(box.lowers[0] / name, f"beneath-{name}")
    (box.lowers[0] / "file").write_text("beneath")
    (box.stack.dir / "other-file").write_text("mounted")
    mounts.mount("none", box.lowers[0] / "before", "tmpfs")
    fill(box.lowers[0] / "before", "mounted")
    mounts.bind(box.stack.dir / "other-file", box.lowers[0] / "file")
    try:
        with box.layerfs() as m:
            mounts.mount("none", box.lowers[0] / "after", "tmpfs")
            fill(box.lowers[0] / "after", "mounted")
            assert names(m.mnt / "before") == ["beneath-before"]
            assert names(m.mnt / "after") == ["beneath-after"]
            assert content(m.mnt / "file") == b"beneath"
            (m.mnt / "before" / "new").write_text("x")
            os.rename(m.mnt / "after", m.mnt / "renamed")
            (m.mnt / "file").write_text("changed")
            assert_alive(m)
        assert (box.stack.dir / "other-file").read_text() == "mounted"
    finally:
        for name in ("before", "after", "file"):
            mounts.umount(box.lowers[0] / name, mounts.MNT_DETACH)


def test_file_systems_inside_a_lower_of_an_ordinary_user(
    ordinary_user: tuple[int, int], make_stack: type[Stack]
) -> None:
    """Who may not clone mounts may see what is mounted in there; but no file is taken for another."""
    stack = make_stack(owner=ordinary_user)
    inside = [fill(stack.lowers[0] / name) for name in ("one", "two")]
    for path in inside:
        mounts.mount("none", path, "tmpfs")
        fill(path, "f").chmod(0o755)
        (path / "f").write_text(path.name)
        os.chmod(path / "f", 0o644)
    try:
        with Layerfs(stack, as_user=ordinary_user) as m:
            script = (
                f"cd {m.mnt}; exec 3<one/f; exec 4<two/f; cat <&3; echo; cat <&4; echo;"
                "stat -c %i one/f two/f;"
                "touch one/new two/new; mv one uno; ls uno"
            )
            done = m.run("sh", "-c", script)
            lines = done.stdout.splitlines()
            if lines:
                assert lines[:2] == ["one", "two"] and lines[2] != lines[3], (lines, done.stderr)
            assert m.run("touch", str(m.mnt / "alive")).returncode == 0
        assert [names(path) for path in inside] == [["f"], ["f"]]
    finally:
        for path in inside:
            mounts.umount(path)


def test_lower_unmounted_while_mounted(box: Box) -> None:
    """`umount -l` of a lower's file system takes nothing from the mount; at the end it is free."""
    mounts.mount("none", box.lowers[0], "tmpfs")
    box.stack.write(box.lowers[0], TREE)
    (box.lowers[0] / "d" / "many").mkdir()
    for n in range(50):
        (box.lowers[0] / "d" / "many" / str(n)).write_text(str(n))
    with box.layerfs() as m:
        assert names(m.mnt / "d") == ["f", "many", "sub"]
        mounts.umount(box.lowers[0], mounts.MNT_DETACH)
        assert names(box.lowers[0]) == []
        assert len(os.listdir(m.mnt / "d" / "many")) == 50
        assert content(m.mnt / "d" / "many" / "7") == b"7"
        for n in range(50):
            os.unlink(m.mnt / "d" / "many" / str(n))
        os.rmdir(m.mnt / "d" / "many")
        work_in(m.mnt)
        check_work(m.mnt)
        assert_alive(m)


def test_lowers_file_system_can_be_unmounted_after_layerfs(box: Box) -> None:
    """Plain umount, at once: nothing of the daemon keeps it busy when `layerfs umount` returned."""
    for _ in range(2):
        mounts.mount("none", box.lowers[0], "tmpfs")
        box.stack.write(box.lowers[0], TREE)
        with box.layerfs() as m:
            fd = os.open(m.mnt / "d" / "f", os.O_RDONLY)
            os.close(fd)
            walk(m.mnt)
        mounts.umount(box.lowers[0])


# --- dead daemons ---------------------------------------------------------------------------------


def test_killed_daemon(box: Box) -> None:
    """SIGKILL: everything gives ENOTCONN, also what was open; `layerfs umount` clears it, a new mount has all
    that was written before.
    """
    box.stack.write(box.lowers[0], TREE)
    box.layers_done()
    m = box.layerfs()
    m.open()
    try:
        work_in(m.mnt)
        held = os.open(m.mnt / "e" / "f", os.O_RDWR)
        directory = os.open(m.mnt / "e", os.O_RDONLY)
        os.write(held, b"written before")
        before = os.stat(m.mnt / "e" / "f").st_ino
        m.kill()
        gone = ("ENOTCONN", "ECONNABORTED")
        assert err(os.statvfs, m.mnt) in gone
        assert err(os.stat, m.mnt) in (*gone, None)  # what the kernel was told for ever it goes on telling
        assert err(os.listdir, m.mnt) in gone
        # The kernel opens what it knows without asking; of the file it has what was read.
        assert err(os.open, m.mnt / "e" / "f", os.O_RDONLY) in (*gone, None)
        assert err(os.open, m.mnt / "e" / "made", os.O_WRONLY | os.O_CREAT) in gone
        assert err(os.write, held, b"x") in gone
        assert err(os.fsync, held) in gone
        assert err(os.fstat, held) in (*gone, None)
        assert err(os.listdir, directory) in gone
        os.close(directory)
        try:
            os.close(held)
        except OSError:
            pass
    finally:
        m.close()
    with m:
        check = content(m.mnt / "e" / "f")
        assert isinstance(check, bytes) and check.startswith(b"written before") and len(check) == 5000
        assert os.stat(m.mnt / "e" / "f").st_ino == before
        assert names(m.mnt / "e") == ["f", "new", "sub"]
        assert_alive(m)


def test_new_mount_over_a_dead_one(box: Box) -> None:
    """`layerfs mount` on a dead mount clears it itself: one file system at the mount point afterwards."""
    box.stack.write(box.lowers[0], TREE)
    box.layers_done()
    m = box.layerfs()
    m.open()
    work_in(m.mnt)
    m.kill()
    mounts.live.remove(m)
    m.open()
    try:
        check_work(m.mnt)
        assert [kind for _, kind in mounts.mounts_below(box.mnt)] == ["fuse.layerfs"]
        assert_alive(m)
    finally:
        m.close()
    assert mounts.mounts_below(box.mnt) == []


def test_killed_while_callers_wait(box: Box) -> None:
    """Callers in the middle of requests get an errno; none hangs, no success is told that did not last."""
    for n in range(20):
        (box.lowers[0] / f"f{n}").write_bytes(os.urandom(1 << 20))
    box.layers_done()
    m = box.layerfs()
    m.open()
    outcomes: dict[int, tuple[int | None, int]] = {}
    begun = threading.Barrier(9)

    def worker(number: int) -> None:
        begun.wait()
        done = 0
        try:
            for n in range(10_000):
                path = m.mnt / f"f{(n + number) % 20}"
                with open(path, "r+b") as file:
                    file.write(b"worker")
                (m.mnt / f"w{number}-{n}").write_text("done")
                done = n
        except OSError as error:
            outcomes[number] = (error.errno, done)

    threads = [threading.Thread(target=worker, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    while not (m.mnt / "w0-3").exists() and threads[0].is_alive():
        time.sleep(0.01)
    m.kill()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a caller hangs in a dead mount"
    m.close()
    import errno

    allowed = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.EINTR}
    assert len(outcomes) == 8 and {code for code, _ in outcomes.values()} <= allowed, outcomes
    with m:
        for number, (_, done) in outcomes.items():
            for n in range(done + 1):
                assert content(m.mnt / f"w{number}-{n}") == b"done"
        for n in range(20):
            data = content(m.mnt / f"f{n}")
            assert isinstance(data, bytes) and (data[:6] == b"worker" or len(data) == 1 << 16)
        assert_alive(m)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_daemon_of_the_lower_mount_dies(box: Box, how: signal.Signals) -> None:
    """A mount whose lower was a layerfs mount that died: errors for what lay there, no crash, and it ends."""
    box.stack.write(box.lowers[0], TREE)
    box.layers_done()
    above = Stack(n_lowers=0, name="above")
    below = box.layerfs()
    below.open()
    above.lowers = [below.mnt]
    with Layerfs(above) as m:
        assert content(m.mnt / "a") == b"linked"
        (m.mnt / "own").write_text("own")
        below.kill(how)
        try:
            below.close()
        except RuntimeError:
            below.remove_by_force()
        assert content(m.mnt / "own") == b"own"
        walk(m.mnt)
        err((m.mnt / "d" / "new").write_text, "x")
        err(os.rename, m.mnt / "d", m.mnt / "e")
        err(os.unlink, m.mnt / "b")
        assert_alive(m)
    above.remove()
