"""An upper written by layerfs is equal under kernel overlayfs, and the reverse."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Dir, Entry, File, Hardlink, Stack
from tests.support.tree import assert_equal, lowers_guard, snapshot

from . import work

KERNEL_ON = "redirect_dir=on,metacopy=on"
INDEX = ["index=off", "index=on"]


@pytest.fixture(autouse=True)
def needs(kernel_overlay: None) -> None:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)


def in_kernel(stack: Stack, index: str) -> KernelOverlay:
    return KernelOverlay(stack, f"{KERNEL_ON},{index}")


# --- layerfs writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("lowers", [1, 3])
def test_written_by_layerfs(make_stack: type[Stack], lowers: int) -> None:
    """First that the work gives what it gives on a plain directory; then the same under the kernel, index off
    and on, and changes made there are seen by layerfs again.
    """
    began = time.time_ns()
    stack, other = make_stack(n_lowers=lowers), make_stack()
    work.lay_out(stack)
    if lowers == 1:
        other.write(other.mnt, work.TREE)
    else:
        work.plain(other)
    work.work_in(other.mnt)
    with lowers_guard(stack.lowers):
        with Layerfs(stack) as m:
            work.work_in(m.mnt)
            numbers = work.unique_numbers(m.mnt)
            live = work.look(m.mnt)
            m.remount()
            assert_equal(live, work.look(m.mnt), message="after remount")
            assert work.unique_numbers(m.mnt) == numbers
        assert_equal(
            work.look(other.mnt),
            live,
            recent_ns=began - 10**9,
            labels=("plain", "layerfs"),
            message="layerfs",
        )
        for index in INDEX:
            with in_kernel(stack, index) as kernel:
                assert_equal(live, work.look(kernel.mnt), labels=("layerfs", "kernel"), message=index)
        # The kernel goes on where layerfs stopped, and layerfs again.
        with in_kernel(stack, "index=off") as kernel:
            (kernel.mnt / "by-kernel").write_text("by the kernel")
            os.rename(kernel.mnt / "arrived", kernel.mnt / "arrived-again")
            os.chmod(kernel.mnt / "dir" / "sub" / "deep" / "h", 0o600)
            os.rename(kernel.mnt / "dir" / "sub" / "deep", kernel.mnt / "deep-out")
            after = work.look(kernel.mnt)
        with Layerfs(stack) as m:
            assert_equal(after, work.look(m.mnt), labels=("kernel", "layerfs"), message="after the kernel")
            work.unique_numbers(m.mnt)
            os.rename(m.mnt / "deep-out", m.mnt / "dir" / "sub" / "deep-back")
            with open(m.mnt / "dir" / "sub" / "deep-back" / "h", "ab") as file:
                file.write(b"appended")
            again = work.look(m.mnt)
        with in_kernel(stack, "index=on") as kernel:
            assert_equal(again, work.look(kernel.mnt), labels=("layerfs", "kernel"))


def test_hard_links_written_by_layerfs(make_stack: type[Stack]) -> None:
    """Each of: written, chmod'ed, one name removed, renamed, linked anew, all removed; names in renamed
    directories.
    """
    stack = make_stack(n_lowers=2)
    tree: dict[str | bytes, Entry] = {"d": Dir(), "e": Dir()}
    for case in ("write", "chmod", "unlink", "rename", "link", "all-gone", "over", "dir"):
        tree |= {
            f"{case}-a": File(data=case.encode() * 100),
            f"d/{case}-b": Hardlink(f"{case}-a"),
            f"e/{case}-c": Hardlink(f"{case}-a"),
        }
    stack.write(stack.lowers[1], tree)
    with lowers_guard(stack.lowers), Layerfs(stack) as m:
        p = m.mnt
        work.write(p / "write-a", b"WRITTEN")
        os.chmod(p / "d" / "chmod-b", 0o600)
        os.unlink(p / "e" / "unlink-c")
        os.rename(p / "rename-a", p / "d" / "renamed")
        os.link(p / "e" / "link-c", p / "link-d")
        for name in ("all-gone-a", "d/all-gone-b", "e/all-gone-c"):
            os.unlink(p / name)
        (p / "other").write_text("other")
        os.rename(p / "other", p / "d" / "over-b")
        os.rename(p / "d", p / "d-moved")
        work.write(p / "d-moved" / "dir-b", b"IN THE MOVED ONE")
        live = work.look(p)
        numbers = work.unique_numbers(p)
        assert live[b"write-a"].nlink == 3 and live[b"link-a"].nlink == 4 and live[b"unlink-a"].nlink == 2
        m.remount()
        assert_equal(live, work.look(p), message="after remount")
        assert work.unique_numbers(p) == numbers
    for index in INDEX:
        with in_kernel(stack, index) as kernel:
            assert_equal(live, work.look(kernel.mnt), labels=("layerfs", "kernel"), message=index)


# --- the kernel writes ----------------------------------------------------------------------------


@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize("lowers", [1, 3])
def test_written_by_the_kernel(make_stack: type[Stack], lowers: int, index: str) -> None:
    stack = make_stack(n_lowers=lowers)
    work.lay_out(stack)
    with lowers_guard(stack.lowers):
        with in_kernel(stack, index) as kernel:
            work.work_in(kernel.mnt, whole_links=index == "index=on")
            live = work.look(kernel.mnt)
        with Layerfs(stack) as m:
            assert_equal(live, work.look(m.mnt), labels=("kernel", "layerfs"))
            numbers = work.unique_numbers(m.mnt)
            m.remount()
            assert work.unique_numbers(m.mnt) == numbers
            # Copying up what the kernel left half (metadata only, redirects) keeps everything.
            for path in ("big-chmod", "big-new-name", "dir/sub/deep/big-here"):
                fd = os.open(m.mnt / path, os.O_WRONLY)
                os.pwrite(fd, work.BIG[:1], 0)
                os.close(fd)
            os.rename(m.mnt / "arrived", m.mnt / "arrived-again")
            os.rename(m.mnt / "dir", m.mnt / "dir-moved")
            (m.mnt / "arrived-again" / "new").write_text("new")
            assert (m.mnt / "dir-moved" / "sub" / "deep" / "big-here").read_bytes() == work.BIG
            assert {
                n.replace(b"dir-moved", b"dir").replace(b"arrived-again", b"arrived"): i
                for n, i in work.unique_numbers(m.mnt).items()
                if n != b"arrived-again/new"
            } == numbers
            after = work.look(m.mnt)
        with in_kernel(stack, index) as kernel:
            assert_equal(after, work.look(kernel.mnt), labels=("layerfs", "kernel"))


@pytest.mark.parametrize("index", INDEX)
def test_hard_links_written_by_the_kernel(make_stack: type[Stack], index: str) -> None:
    """All names used: the upper holds them all, and a count of its own with index=on."""
    stack = make_stack()
    stack.write(
        stack.lowers[0],
        {
            "a": File(data=b"linked" * 1000),
            "b": Hardlink("a"),
            "c": Hardlink("a"),
            "m": File(data=b"meta" * 1000),
            "n": Hardlink("m"),
        },
    )
    (stack.upper / "u").write_text("upper")  # type: ignore[operator]
    os.link(stack.upper / "u", stack.upper / "v")  # type: ignore[operator]
    with in_kernel(stack, index) as kernel:
        for name in "abc":
            work.write(kernel.mnt / name, name.encode(), 3)
        os.chmod(kernel.mnt / "m", 0o600)
        os.utime(kernel.mnt / "n", (1, 1))
        os.link(kernel.mnt / "u", kernel.mnt / "w")
        os.unlink(kernel.mnt / "v")
        live = work.look(kernel.mnt)
    with Layerfs(stack) as m:
        assert_equal(live, work.look(m.mnt), labels=("kernel", "layerfs"), message=index)
        work.unique_numbers(m.mnt)


def test_hard_links_of_which_the_kernel_copied_some(make_stack: type[Stack]) -> None:
    """index=on keeps in work/index what the other names of a file are."""
    stack = make_stack()
    stack.write(stack.lowers[0], {"a": File(data=b"old"), "b": Hardlink("a"), "c": Hardlink("a")})
    with in_kernel(stack, "index=on") as kernel:
        work.write(kernel.mnt / "a", b"new")
        live = work.look(kernel.mnt)
        assert live[b"c"].nlink == 3
    with Layerfs(stack) as m:
        assert_equal(live, work.look(m.mnt), labels=("kernel", "layerfs"))


def test_redirects_upon_redirects(make_stack: type[Stack]) -> None:
    """Layers that were uppers: each renames what the one below renamed. Written in turn, read by both."""
    stack = make_stack()
    stack.write(
        stack.lowers[0],
        {"a": Dir(), "a/b": Dir(), "a/b/c": Dir(), "a/b/c/f": File(data=b"f"), "big": File(data=work.BIG)},
    )
    where, file = "a/b", "big"
    for number in range(4):
        system = Layerfs(stack) if number % 2 else in_kernel(stack, "index=off")
        with system as m:
            os.rename(m.mnt / where, m.mnt / f"moved{number}")
            os.rename(
                m.mnt / file.replace(where, f"moved{number}"), m.mnt / f"moved{number}" / f"big{number}"
            )
            os.chmod(m.mnt / f"moved{number}" / f"big{number}", 0o600 + number)
            (m.mnt / f"moved{number}" / "c" / f"n{number}").write_text(str(number))
            where, file = f"moved{number}", f"moved{number}/big{number}"
            live = work.look(m.mnt)
            if number % 2 == 0:
                os.mkdir(m.mnt / f"moved{number}" / f"again{number}")
                os.rename(m.mnt / f"moved{number}" / "c", m.mnt / f"moved{number}" / f"again{number}" / "c2")
                os.rename(m.mnt / f"moved{number}" / f"again{number}" / "c2", m.mnt / f"moved{number}" / "c")
                live = work.look(m.mnt)
        with in_kernel(stack, "index=off") as kernel:
            assert_equal(live, work.look(kernel.mnt), labels=("writer", "kernel"), message=f"round {number}")
        with Layerfs(stack) as m:
            assert_equal(live, work.look(m.mnt), labels=("writer", "layerfs"), message=f"round {number}")
            work.unique_numbers(m.mnt)
        # What was the upper becomes the top lower.
        assert stack.upper is not None and stack.work is not None
        stack.lowers.insert(0, stack.upper)
        stack.upper = stack._mkdir(f"upper{number}")
        stack.work = stack._mkdir(f"work{number}")


def test_xwhiteouts(make_stack: type[Stack]) -> None:
    """Whiteouts in xattr form in lower layers, as a nested overlay leaves them, with opaque=x on their
    directory.
    """
    stack = make_stack(n_lowers=3)
    for layer in stack.lowers[1:]:
        stack.write(layer, {"d": Dir(), "d/gone": File(data=b"1"), "d/stays": File(data=b"2"), "top": File()})
    top = stack.lowers[0]
    stack.write(
        top,
        {"d": Dir(), "d/gone": File(), "d/not-empty": File(data=b"x"), "d/unmarked": File(), "top": File()},
    )
    os.setxattr(top, "trusted.overlay.opaque", b"x")
    os.setxattr(top / "d", "trusted.overlay.opaque", b"x")
    for name in ("d/gone", "d/not-empty", "top"):
        os.setxattr(top / name, "trusted.overlay.whiteout", b"y")
    with KernelOverlay(stack, KERNEL_ON) as kernel:
        live = work.look(kernel.mnt)
    with Layerfs(stack) as m:
        assert_equal(live, work.look(m.mnt), labels=("kernel", "layerfs"))
        assert sorted(os.listdir(m.mnt)) == ["d"]
        (m.mnt / "d" / "gone").write_text("back")
        os.rename(m.mnt / "d", m.mnt / "e")
        after = work.look(m.mnt)
    with KernelOverlay(stack, KERNEL_ON) as kernel:
        assert_equal(after, work.look(kernel.mnt), labels=("layerfs", "kernel"))


# --- without redirects and metadata-only copies ---------------------------------------------------


def overlay_xattrs(upper: Path, prefix: str) -> set[str]:
    found: set[str] = set()
    for root, dirs, files in os.walk(os.fsencode(upper)):
        for name in [b"", *dirs, *files]:
            for xattr in os.listxattr(os.path.join(root, name), follow_symlinks=False):
                if xattr.startswith(prefix):
                    found.add(xattr[len(prefix) :])
    return found


@pytest.mark.parametrize(
    "options", ["redirect_dir=off,metacopy=off", "redirect_dir=off", "metacopy=off"], ids=str
)
def test_without_redirects_or_metacopy(make_stack: type[Stack], options: str) -> None:
    """Everything works all the same (no EXDEV); the upper holds none of the marks that were ruled out, and
    the kernel reads it with the same options.
    """
    began = time.time_ns()
    stack, other = make_stack(n_lowers=2), make_stack()
    work.lay_out(stack)
    work.plain(other)
    work.work_in(other.mnt)
    with lowers_guard(stack.lowers), Layerfs(stack, options) as m:
        work.work_in(m.mnt)
        live = work.look(m.mnt)
        numbers = work.unique_numbers(m.mnt)
        m.remount()
        assert_equal(live, work.look(m.mnt), message="after remount")
        assert work.unique_numbers(m.mnt) == numbers
    assert_equal(work.look(other.mnt), live, recent_ns=began - 10**9, labels=("plain", "layerfs"))
    assert stack.upper is not None
    marks = overlay_xattrs(stack.upper, "trusted.overlay.")
    if "redirect_dir=off" in options:
        # Without redirects a renamed metadata-only file could not be followed either.
        assert "redirect" not in marks and "metacopy" not in marks
    if "metacopy=off" in options:
        assert "metacopy" not in marks
    kernel_options = ",".join(
        o.replace("redirect_dir=off", "redirect_dir=nofollow") for o in options.split(",")
    )
    if "metacopy" not in kernel_options:
        kernel_options += ",metacopy=off"
    for index in INDEX:
        with KernelOverlay(stack, f"{kernel_options},{index}") as kernel:
            assert_equal(live, work.look(kernel.mnt), labels=("layerfs", "kernel"), message=index)


@pytest.mark.parametrize("who", ["root", "user"])
def test_user_xattrs_readable_by_the_kernel(make_stack: type[Stack], who: str) -> None:
    """`userxattr` and no redirects, no metacopy: the kernel reads that upper with `userxattr`."""
    owner = (65534, 65534) if who == "user" else None
    if owner and (reason := mounts.why_no_layerfs(owner[0])):
        pytest.skip(reason)
    stack = make_stack(n_lowers=2, owner=owner, prefix="user.overlay.")
    tree = {
        name: entry
        for name, entry in work.TREE.items()
        if not (isinstance(entry, work.Node) and entry.kind != stat.S_IFIFO) and "device" not in str(name)
    }
    stack.write(stack.lowers[1], {n: _mine(e) for n, e in tree.items()})
    stack.write(stack.lowers[0], {"dir": _mine(work.TREE["dir"]), "dir/from-top": File(data=b"top")})
    options = "userxattr,redirect_dir=off,metacopy=off"
    script = stack.dir / "work.py"
    script.write_text(_SCRIPT)
    with lowers_guard(stack.lowers, ctime=True):
        m = Layerfs(stack, options, as_user=owner, args=[])
        with m:
            done = m.run(sys.executable, str(script), str(m.mnt), str(Path(__file__).parents[2]))
            assert done.returncode == 0, done.stderr
            live = _look_as(m, owner)
            m.remount()
            assert _look_as(m, owner) == live, "after remount"
        marks = overlay_xattrs(stack.upper, "user.overlay.")  # type: ignore[arg-type]
        assert "redirect" not in marks and "metacopy" not in marks
        assert not overlay_xattrs(stack.upper, "trusted.overlay.")  # type: ignore[arg-type]
        with KernelOverlay(stack, "userxattr") as kernel:
            assert _look(kernel.mnt) == live


def _mine(entry: Entry) -> Entry:
    """The entry as somebody without privileges can have it: owned by whoever owns the stack."""
    if isinstance(entry, Hardlink):
        return entry
    return replace(entry, uid=0, gid=0, mode=entry.mode & 0o777)  # type: ignore[type-var,attr-defined]


#: The work that an ordinary user can do on files of his own.
_SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
p = Path(sys.argv[1])
def write(path, data, at=0):
    fd = os.open(path, os.O_WRONLY); os.pwrite(fd, data, at); os.close(fd)
(p / "dir" / "new").write_text("new")
write(p / "dir" / "f", b"F")
os.unlink(p / "dir" / "sub" / "g")
os.rename(p / "moved", p / "arrived")
os.rename(p / "arrived" / "child", p / "child-out")
os.mkdir(p / "moved"); (p / "moved" / "f").write_text("another")
os.rename(p / "twice", p / "dir" / "twice")
os.unlink(p / "gone-dir" / "x"); os.rmdir(p / "gone-dir"); os.mkdir(p / "gone-dir")
write(p / "big", b"changed", 5000)
os.chmod(p / "big-chmod", 0o600)
os.rename(p / "big-renamed", p / "big-new-name")
os.truncate(p / "big-cut", 12345)
os.rename(p / "symlink-moved", p / "dir" / "symlink-here")
os.unlink(p / "symlink"); os.symlink("again", p / "symlink")
os.unlink(p / "gone")
os.unlink(p / "back"); (p / "back").write_text("back")
write(p / "link-a", b"LINKED")
os.chmod(p / "chmod-link-b", 0o604)
os.unlink(p / "unlinked-link-b")
os.setxattr(p / "user-file", "user.c", b"3")
os.chmod(p / "fifo", 0o600)
os.rename(p / "dir", p / "dir2"); os.rename(p / "dir2", p / "dir")
for path in p.rglob("*"):
    os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)
os.utime(p, ns=(10**18, 10**18))
"""

_LOOK = """
import os, sys
sys.path.insert(0, sys.argv[2])
from tests.support.tree import snapshot
for name, e in sorted(snapshot(sys.argv[1]).items()):
    print(name, e.type, oct(e.mode), e.uid, e.gid, e.size, e.mtime_ns, e.nlink, e.xattrs, e.target, e.digest,
          sorted(e.names))
"""


def _look(mnt: Path) -> str:
    here = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, str(mnt), here], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _look_as(m: Layerfs, owner: tuple[int, int] | None) -> str:
    done = m.run(sys.executable, "-c", _LOOK, str(m.mnt), str(Path(__file__).parents[2]))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("who", ["root", "user"])
def test_user_xattrs_with_everything_on(make_stack: type[Stack], who: str) -> None:
    """Redirects and metacopy under `user.` marks: layerfs reads them back; the kernel refuses them."""
    owner = (65534, 65534) if who == "user" else None
    if owner and (reason := mounts.why_no_layerfs(owner[0])):
        pytest.skip(reason)
    stack = make_stack(n_lowers=2, owner=owner, prefix="user.overlay.")
    tree = {n: e for n, e in work.TREE.items() if not isinstance(e, work.Node) or e.kind == stat.S_IFIFO}
    stack.write(stack.lowers[1], {n: _mine(e) for n, e in tree.items()})
    script = stack.dir / "work.py"
    script.write_text(_SCRIPT)
    with lowers_guard(stack.lowers), Layerfs(stack, "userxattr", as_user=owner) as m:
        done = m.run(sys.executable, str(script), str(m.mnt), str(Path(__file__).parents[2]))
        assert done.returncode == 0, done.stderr
        live = _look_as(m, owner)
        m.remount()
        assert _look_as(m, owner) == live
    assert {"redirect", "metacopy"} <= overlay_xattrs(stack.upper, "user.overlay.")  # type: ignore[arg-type]
    assert snapshot(stack.lowers[1])


def test_numbers_without_room_for_marks(make_stack: type[Stack]) -> None:
    """An ordinary user cannot mark symlinks and fifos with xattrs: their numbers hold all the same, through
    copy-up, rename, links, remounts, and when an inode of the upper is used again.
    """
    owner = (65534, 65534)
    if reason := mounts.why_no_layerfs(owner[0]):
        pytest.skip(reason)
    stack = make_stack(n_lowers=2, owner=owner, prefix="user.overlay.")
    stack.write(
        stack.lowers[1],
        {
            "d": Dir(),
            **{f"link{n}": work.Symlink(target=f"t{n}") for n in range(6)},
            **{f"d/fifo{n}": work.Node() for n in range(4)},
            "file": File(data=b"f", mode=0o444),
        },
    )

    def numbers(m: Layerfs) -> dict[str, str]:
        done = m.run("find", str(m.mnt), "-mindepth", "1", "-printf", "%P %i\n")
        return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())

    def shell(m: Layerfs, script: str) -> None:
        done = m.run("sh", "-ec", f"cd {m.mnt}; {script}")
        assert done.returncode == 0, done.stderr

    with lowers_guard(stack.lowers), Layerfs(stack, as_user=owner) as m:
        before = numbers(m)
        shell(m, "touch -h -d @5 link0 link1 link2; chmod 600 d/fifo0 d/fifo1; touch -d @5 file")
        assert numbers(m) == before
        m.remount()
        assert numbers(m) == before
        shell(m, "mv link0 d/moved; mv d/fifo0 fifo; ln -P link1 d/again; rm link2 d/fifo1; mv d e")
        wanted = {
            name.replace("d/", "e/") if name != "d" else "e": number
            for name, number in before.items()
            if name not in ("link0", "d/fifo0", "link2", "d/fifo1")
        }
        wanted |= {"e/moved": before["link0"], "fifo": before["d/fifo0"], "e/again": before["link1"]}
        for _ in range(2):
            assert numbers(m) == wanted
            m.remount()
        # New ones may get the inodes of those that went.
        shell(m, "for n in 1 2 3 4 5 6; do ln -s new$n new$n; mkfifo newf$n; done")
        now = numbers(m)
        assert {n: i for n, i in now.items() if not n.startswith("new")} == wanted
        assert len(set(now.values())) == len(now) - 1  # link1 and e/again are one
        m.remount()
        assert numbers(m) == now
