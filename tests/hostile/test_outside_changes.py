"""Lowers and upper are changed from outside while mounted, which nobody should do.

Contents are then undefined. What must hold: the daemon lives and stays without a traceback, nothing outside
the upper and the work directory is written, nothing outside the layers is read, and no request hangs.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from layerfs.fdutil import RENAME_EXCHANGE, renameat2
from tests.support import mounts
from tests.support.mounts import Layerfs
from tests.support.processes import spawn
from tests.support.tree import assert_equal, snapshot

from .conftest import CANARY_NAME, SECRET, Box, assert_alive, content, err, fill, names, walk

PATIENCE = 12


def lay_out(root: Path) -> None:
    for top in ("d1", "d2", "d3"):
        fill(root / top / "sub" / "deep", "f1", "f2", "secret")
        fill(root / top, "f1", "f2", "f3", "secret")
        os.link(root / top / "f1", root / top / "f1-linked")
        (root / top / "big").write_bytes(b"0123456789" * 20_000)
        (root / top / "link").symlink_to("f1")
        os.mkfifo(root / top / "fifo")


def within(m: Layerfs, call: Callable[[Path], object]) -> None:
    """Runs `call` with the mount's root in another process, chrooted into the mount: symbolic links to the
    canary that the layers hold lead nowhere for the caller itself. Fails when it hangs, and then kills the
    daemon, since nothing else ends it.
    """

    def inside() -> None:
        os.chroot(m.mnt)
        os.chdir("/")
        call(Path("/"))

    child = spawn(inside)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, "the child failed"
            return
        time.sleep(0.01)
    m.kill()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("a request hangs")


def use(mnt: Path) -> None:
    """What programs do all day, errors allowed; nothing of the canary may be seen."""
    walk(mnt)
    for top in ("d1", "d2", "d3"):
        _use(mnt / top)


def put(path: Path, data: bytes, flags: int = os.O_TRUNC) -> None:
    """Writes without waiting at a fifo."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flags, 0o644)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _use(here: Path) -> None:
    for attempt in (
        lambda: put(here / "f1", b"changed"),
        lambda: put(here / "big", b"appended", os.O_APPEND),
        lambda: os.chmod(here / "f2", 0o600),
        lambda: os.chown(here / "f3", 1, 1),
        lambda: os.setxattr(here / "f3", "user.x", b"y"),
        lambda: os.truncate(here / "secret", 3),
        lambda: put(here / "secret", b"overwritten"),
        lambda: put(here / "sub" / "secret", b"new"),
        lambda: put(here / "sub" / "deep" / "secret", b"overwritten"),
        lambda: os.unlink(here / "sub" / "deep" / "f1"),
        lambda: os.rename(here / "sub" / "deep" / "f2", here / "sub" / "f2"),
        lambda: os.rename(here / "sub", here / "sub-moved"),
        lambda: os.rename(here / "sub-moved", here / "sub"),
        lambda: os.link(here / "f1-linked", here / "f1-again"),
        lambda: os.utime(here),
        lambda: os.mkdir(here / "new"),
        lambda: put(here / "new" / "f", b"new"),
        lambda: os.symlink("x", here / "new-link"),
        lambda: os.listdir(here / "sub" / "deep"),
        lambda: os.unlink(here / "link"),
        lambda: os.unlink(here / "sub" / "deep" / "secret"),
        lambda: os.rmdir(here / "sub" / "deep"),
        lambda: os.rmdir(here / "sub"),
    ):
        try:
            attempt()
        except OSError as error:
            assert error.errno != errno.ENOTCONN, "the daemon is gone"


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        _remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_tree(path: Path | str, above: int | None = None) -> None:
    """As far as that goes. Not shutil.rmtree, which opens without O_DIRECTORY what was a directory a moment
    ago, and waits for ever where a user of the mount has moved a fifo there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
    except OSError:
        return
    try:
        for name in os.listdir(fd):
            try:
                os.unlink(name, dir_fd=fd)
            except IsADirectoryError:
                _remove_tree(name, fd)
            except OSError:
                continue
    finally:
        os.close(fd)
    with suppress(OSError):
        os.rmdir(path, dir_fd=above)


def make_file(path: Path, data: bytes) -> None:
    """A new file. Never through a link to the canary nor into a fifo, which a user of the mount may have
    moved to this name since it was removed: the changer must not do itself what it is to tempt layerfs
    into.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def to_canary_file(box: Box, path: Path) -> None:
    remove(path)
    path.symlink_to(box.canary / "secret")


def to_canary_dir(box: Box, path: Path) -> None:
    remove(path)
    path.symlink_to(box.canary)


def to_relative_canary(box: Box, path: Path) -> None:
    remove(path)
    top = box.stack.dir if path.is_relative_to(box.stack.dir) else Path("/")  # "/": see `race`
    up = "../" * len(path.relative_to(top).parent.parts)
    path.symlink_to(f"{up}canary/secret")


def to_fifo(box: Box, path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def to_directory(box: Box, path: Path) -> None:
    remove(path)
    fill(path, "other")


def to_file(box: Box, path: Path) -> None:
    remove(path)
    make_file(path, b"file")


def to_whiteout(box: Box, path: Path) -> None:
    remove(path)
    os.mknod(path, stat.S_IFCHR, 0)


def to_device(box: Box, path: Path) -> None:
    remove(path)
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(240, 4077))


def to_socket(box: Box, path: Path) -> None:
    remove(path)
    os.mknod(path, stat.S_IFSOCK | 0o666)


def gone(box: Box, path: Path) -> None:
    remove(path)


def swapped(box: Box, path: Path) -> None:
    other = path.with_name("d2" if path.name != "d2" else "d3")
    if other.exists() and path.exists():
        os.rename(path, path.with_name("tmp"))
        os.rename(other, path)
        os.rename(path.with_name("tmp"), other)


def moved_inside(box: Box, path: Path) -> None:
    if path.exists():
        os.rename(path, path.with_name(path.name + "-moved-away"))


CHANGES = [
    gone,
    to_canary_file,
    to_canary_dir,
    to_relative_canary,
    to_fifo,
    to_directory,
    to_file,
    to_whiteout,
    to_device,
    to_socket,
    swapped,
    moved_inside,
]
TARGETS = [
    "d1/f1",
    "d1/f2",
    "d1/big",
    "d1/secret",
    "d1/link",
    "d1/sub",
    "d1/sub/deep",
    "d2",
    "d3/sub",
    "d3/f1-linked",
]


@pytest.mark.parametrize("known", ["looked up", "held open", "not yet seen"])
@pytest.mark.parametrize("layer", ["lower", "upper"])
def test_each_change(box: Box, layer: str, known: str) -> None:
    """One mount; each change is made on a tree of its own, before, after and while it is in use."""
    root = box.lowers[0] if layer == "lower" else box.upper
    for change in CHANGES:
        lay_out(root / change.__name__)
        fill(box.lowers[1] / change.__name__ / "d1" / "sub", "from-below")
    with box.layerfs() as m:
        held: list[int] = []
        for change in CHANGES:
            mnt = m.mnt / change.__name__
            if known != "not yet seen":
                walk(mnt)
            if known == "held open":
                for target in TARGETS:
                    for flags in (os.O_RDONLY, os.O_PATH, os.O_RDWR if layer == "upper" else os.O_RDONLY):
                        try:
                            held.append(os.open(mnt / target, flags | os.O_NOFOLLOW | os.O_NONBLOCK))
                        except OSError:
                            continue
            for target in TARGETS:
                path = root / change.__name__ / target
                if path.parent.is_dir() and not path.parent.is_symlink():
                    change(box, path)
            within(m, lambda root, name=change.__name__: use(root / name))  # type: ignore[misc]
            for fd in held:
                for attempt in (
                    lambda fd=fd: os.read(fd, 100),
                    lambda fd=fd: os.fstat(fd),
                    lambda fd=fd: os.listdir(fd),
                    lambda fd=fd: os.write(fd, b"held"),
                    lambda fd=fd: os.fchmod(fd, 0o640),
                    lambda fd=fd: os.fsync(fd),
                ):
                    err(attempt)
                err(os.close, fd)  # EIO from the kernel's flush of an inode that it gave up
            held.clear()
        assert_alive(m)
        assert m.new_complaints() == ""


def test_upper_root_and_work_are_emptied(box: Box) -> None:
    """`rm -rf upper/* work/*` under a live mount: errors, or what is left; then everything works anew."""
    lay_out(box.upper)
    lay_out(box.lowers[0])
    with box.layerfs() as m:
        walk(m.mnt)
        fd = os.open(m.mnt / "d1" / "f1", os.O_RDWR)
        for base in (box.upper, box.stack.work):
            assert base is not None
            subprocess.run(f"rm -rf {base}/*", shell=True, check=True)
        within(m, use)
        err(os.write, fd, b"x")
        err(os.unlink, m.mnt / "d1" / "f1")
        os.close(fd)
        assert len(m.pids()) == 1
    with box.layerfs() as m:
        use(m.mnt)
        assert_alive(m)


def test_work_directory_is_replaced(box: Box) -> None:
    """The work directory's entries become links to the canary: nothing is made or removed there."""
    lay_out(box.lowers[0])
    work = box.stack.work
    assert work is not None
    with box.layerfs() as m:
        for name in ("work", "layerfs"):
            shutil.rmtree(work / name)
            (work / name).symlink_to(box.canary)
        within(m, use)
        assert len(m.pids()) == 1
    # And a mount that finds them so follows none of them.
    m = box.layerfs()
    done = m.run(*m.command())
    if done.returncode == 0:
        m.run("umount", str(m.mnt))
        m.wait_gone()
    else:
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert names(box.canary) == sorted([CANARY_NAME, "fifo-less", "secret", "sub"])


EVIL_RECORDS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"temporary": 5, "names": []}',
    b'{"temporary": "#0", "names": [["", "../canary/planted"]]}',
    b'{"temporary": "#0", "names": [["../canary", "planted"]]}',
    b'{"temporary": "#0", "names": [["to-canary", "planted"]]}',
    b'{"temporary": "../../canary/secret", "names": [["", "stolen"]]}',
    b'{"temporary": "#0", "names": [["", ".."], ["", "."], ["", ""], ["/", "/planted"]]}',
    b'{"temporary": "#0", "names": [["", "a\\u0000b"], ["\\u0000", "x"]]}',
    b'{"temporary": "#0", "names": [["", "\\u4e00"]]}',
    b'{"temporary": "#\\ud800", "names": [["", "x"]]}',
    b'{"temporary": "#0", "names": {"a": "b"}}',
    b'{"temporary": "#0", "names": [[]]}',
    b'{"temporary": "#0", "names": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b"\xff\xfe" * 100,
]


def test_evil_journals(box: Box) -> None:
    """A work directory written by somebody else: its journals link nothing outside the upper. Those that name
    directories outside may be refused, in one line.
    """
    work = box.stack.work
    assert work is not None
    fill(work / "layerfs")
    fill(work / "work")
    (box.upper / "to-canary").symlink_to(box.canary)
    box.layers_done()
    outside = [record for record in EVIL_RECORDS if b"canary" in record or b"/planted" in record]
    for together in (outside[:1], outside[1:], [each for each in EVIL_RECORDS if each not in outside]):
        for number, record in enumerate(together):
            (work / "layerfs" / f"links.{number:x}").write_bytes(record)
        (work / "work" / "#0").write_text("planted")
        m = box.layerfs()
        done = m.run(*m.command())
        assert "Traceback" not in done.stderr + m.log_text()
        if done.returncode:
            assert together[0] in outside, done.stderr
            assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
            for journal in (work / "layerfs").glob("links.*"):
                journal.unlink()
        else:
            found = walk(m.mnt)
            assert "stolen" not in found and not any(CANARY_NAME in n for n in found)
            assert m.run(*mounts.layerfs_command(), "umount", m.mnt).returncode == 0 and m.wait_gone()
    (work / "layerfs" / "links.0").symlink_to(box.canary / "secret")
    m = box.layerfs()
    done = m.run(*m.command())
    assert "Traceback" not in done.stderr + m.log_text() and done.stderr.count("\n") <= 1
    if done.returncode == 0:
        assert m.run(*mounts.layerfs_command(), "umount", m.mnt).returncode == 0 and m.wait_gone()


def test_evil_work_directory(box: Box) -> None:
    """Links in place of the lock, the number log and temporary objects; a deep tree to be emptied."""
    work = box.stack.work
    assert work is not None
    fill(work / "layerfs")
    (work / "layerfs" / "inodes").write_bytes(
        b"1:00 5 0\n1:00 6 99999999999999999999999\nnonsense\n\xff\n 1 2 3\n" + b"9" * 5000 + b"\n1:0 7 8"
    )
    fill(work / "work")
    for n in range(3):
        (work / "work" / f"#{n:x}").symlink_to(box.canary / "secret")
    (work / "work" / "to-dir").symlink_to(box.canary)
    fill(work / "work" / "locked" / "inside", "f")
    os.chmod(work / "work" / "locked", 0)
    here = os.open(work / "work", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("deep", dir_fd=here)
        below = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    lay_out(box.lowers[0])
    box.layers_done()
    with box.layerfs() as m:
        use(m.mnt)
        assert_alive(m)
    for name in ("layerfs.lock", "layerfs/inodes"):
        (work / name).unlink(missing_ok=True)
        (work / name).symlink_to(box.canary / "secret")
        m = box.layerfs()
        done = m.run(*m.command())
        assert "Traceback" not in done.stderr + m.log_text()
        if done.returncode:
            assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        else:
            use(m.mnt)
            assert m.run("umount", str(m.mnt)).returncode == 0 and m.wait_gone()
        (work / name).unlink()


# --- races ----------------------------------------------------------------------------------------


def race(box: Box, m: Layerfs, roots: list[Path], seconds: float) -> None:
    """One process changes the layers as fast as it can, two use the mount; a seed helps to repeat it."""
    parent = os.getpid()

    def attacker() -> None:
        # In a root of its own, so that it does not follow its own links to the canary.
        os.chroot(box.stack.dir)
        os.chdir("/")
        inside = [Path("/") / root.relative_to(box.stack.dir) for root in roots]
        chance = random.Random(20)
        end = time.monotonic() + seconds
        while time.monotonic() < end and os.getppid() == parent:
            path = chance.choice(inside) / chance.choice(TARGETS)
            try:
                if chance.random() < 0.3:
                    remove(path)
                    if "." not in path.name and path.name.startswith(("d", "sub")):
                        fill(path, "f1", "f2", "secret")
                    else:
                        make_file(path, b"0123456789" * 2000)
                elif chance.random() < 0.3 and path.is_dir() and not path.is_symlink():
                    # A directory and a link to the canary change places, over and over.
                    link = path.with_name("link-to-canary")
                    if not link.is_symlink():
                        link.symlink_to(box.canary)
                    for _ in range(100):
                        _exchange(path, link)
                else:
                    chance.choice(CHANGES)(box, path)
            except (OSError, shutil.Error):
                continue

    def worker() -> None:
        end = time.monotonic() + seconds
        os.chroot(m.mnt)
        os.chdir("/")
        while time.monotonic() < end and os.getppid() == parent:
            use(Path("/"))

    children = [spawn(call) for call in (attacker, worker, worker)]
    deadline = time.monotonic() + seconds + PATIENCE
    failed = []
    for child in children:
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                if status:
                    failed.append(child)
                break
            if time.monotonic() > deadline:
                print(f"child {child} hangs in {Path(f'/proc/{child}/wchan').read_text()}; the daemon:")
                print(*map(mounts._stack_of, m.pids()))
                m.kill()
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                failed.append(child)
                break
            time.sleep(0.02)
    assert not failed, f"children failed or hung: {failed} of {children}"


def _exchange(one: Path, two: Path) -> None:
    renameat2(-100, os.fsencode(one), -100, os.fsencode(two), RENAME_EXCHANGE)


@pytest.mark.parametrize("options", ["", "redirect_dir=off,metacopy=off"])
@pytest.mark.parametrize("layer", ["lower", "upper", "both"])
def test_races(box: Box, layer: str, options: str) -> None:
    races(box, layer, options, 2)


@pytest.mark.long
@pytest.mark.parametrize("layer", ["lower", "upper", "both"])
def test_long_races(box: Box, layer: str) -> None:
    races(box, layer, "", 40)


def races(box: Box, layer: str, options: str, seconds: float) -> None:
    roots = {"lower": [box.lowers[0]], "upper": [box.upper], "both": [box.upper, *box.lowers]}[layer]
    for root in {*roots, box.lowers[1]}:
        lay_out(root)
    with box.layerfs(options) as m:
        race(box, m, roots, seconds)
        assert len(m.pids()) == 1
        assert m.new_complaints() == ""
        # Whatever is left of the tree: new work is done as ever.
        within(m, assert_fresh)


def assert_fresh(mnt: Path) -> None:
    fresh = mnt / "fresh"
    fresh.write_text("yes")
    assert fresh.read_text() == "yes"
    fresh.unlink()


def test_lower_data_change_under_an_open_file(box: Box) -> None:
    """Truncated, grown and overwritten in the lower while it is read, mapped and copied up: no SIGBUS in the
    daemon, no endless copy.
    """
    victim = box.lowers[0] / "victim"
    victim.write_bytes(os.urandom(8 << 20))
    stop = threading.Event()

    def spoil() -> None:
        chance = random.Random(7)
        while not stop.is_set():
            os.truncate(victim, chance.choice((0, 1, 4096, 100_000, 8 << 20, 64 << 20)))

    with box.layerfs() as m:
        thread = threading.Thread(target=spoil)
        thread.start()
        try:
            for n in range(8):
                within(m, lambda root: err(content, root / "victim"))
                within(m, lambda root: err(put, root / "victim", b"x", os.O_APPEND))
                err(os.unlink, box.upper / "victim") if n % 2 else None
        finally:
            stop.set()
            thread.join()
        assert_alive(m)


def test_secrets_stay_where_they_are(box: Box) -> None:
    """The canary's content never comes up, whichever parent directory becomes a link in the last moment."""
    lay_out(box.lowers[0])
    for name in ("d1", "d2", "d3"):
        shutil.rmtree(box.lowers[0] / name / "sub")
        fill(box.lowers[0] / name / "sub", "secret", "other")
    with box.layerfs() as m:
        walk(m.mnt)
        for name in ("d1", "d2", "d3"):
            os.rename(box.lowers[0] / name / "sub", box.lowers[0] / name / "sub-was")
            (box.lowers[0] / name / "sub").symlink_to(box.canary)
        within(m, look_for_secrets)
        assert_alive(m)
    assert_equal(box.canary_before, snapshot(box.canary))


def look_for_secrets(root: Path) -> None:
    for name in ("d1", "d2", "d3"):
        for flags in (os.O_RDONLY, os.O_RDWR):
            try:
                fd = os.open(root / name / "sub" / "secret", flags | os.O_NONBLOCK)
            except OSError:
                continue
            assert os.read(fd, 100) != SECRET
            os.close(fd)
        err(put, root / name / "sub" / "secret", b"overwritten")
        err(put, root / name / "sub" / CANARY_NAME, b"overwritten")
