"""`layerfs flatten`: the same tree before and after, for the kernel without options too, wherever it is
stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.overlay import work
from tests.support import mounts
from tests.support.mounts import FuseOverlayfs, KernelOverlay, Layerfs, layerfs_command
from tests.support.stack import Dir, File, Stack
from tests.support.tree import Snapshot, assert_equal, snapshot

PREFIXES = {"trusted": "", "user": "userxattr"}


def command(stack: Stack, *more: str) -> list[str]:
    argv = [*layerfs_command(), "flatten", "--upper", str(stack.upper), "--work", str(stack.work), *more]
    for lower in stack.lowers:
        argv += ["--lower", str(lower)]
    return argv


def flatten(stack: Stack, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(stack, *more), capture_output=True, text=True, timeout=60)


def kernel_options(stack: Stack) -> list[str] | None:
    argv = [*layerfs_command(), "doctor", "--json", "--upper", str(stack.upper)]
    found = json.loads(subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout)
    options: list[str] | None = found["upper"]["kernel_options"]
    return options


@pytest.fixture
def worked(root: None, make_stack: type[Stack], request: pytest.FixtureRequest) -> tuple[Stack, Snapshot]:
    """An upper with every form in it, and what it shows."""
    stack = make_stack(n_lowers=2)
    work.lay_out(stack)
    # A redirected directory inside one that is the upper's own, and one inside a redirected one.
    stack.write(
        stack.lowers[-1],
        {
            "nest": Dir(),
            "nest/in": Dir(),
            "nest/in/deep": File(data=b"deep"),
            "nest/gone": File(data=b"x"),
            "nest/f": File(data=b"f"),
            "nest/big": File(data=work.BIG),
        },
    )
    with Layerfs(stack, request.param) as m:
        work.work_in(m.mnt)
        (m.mnt / "own").mkdir()
        os.rename(m.mnt / "nest/in", m.mnt / "own/moved-in")
        os.rename(m.mnt / "nest", m.mnt / "own/nest2")
        os.unlink(m.mnt / "own/nest2/gone")
        os.chmod(m.mnt / "own/nest2/big", 0o611)
        tree = work.look(m.mnt)
    return stack, tree


@pytest.mark.parametrize("worked", PREFIXES.values(), indirect=True, ids=PREFIXES)
def test_the_same_tree_for_everybody(worked: tuple[Stack, Snapshot], request: pytest.FixtureRequest) -> None:
    stack, before = worked
    assert stack.upper is not None
    user = "user" in request.node.name
    assert kernel_options(stack) == (None if user else ["redirect_dir=on", "metacopy=on"])
    guard = [snapshot(lower) for lower in stack.lowers]
    done = flatten(stack)  # which of the two prefixes it is, the upper says
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "directories" in done.stderr and len(done.stderr.splitlines()) == 1
    assert kernel_options(stack) == (["userxattr"] if user else [])
    with KernelOverlay(stack, "userxattr" if user else "redirect_dir=off,metacopy=off") as m:
        assert_equal(before, work.look(m.mnt), labels=("before", "kernel"))
    with Layerfs(stack) as m:
        assert m.info()["xattr_prefix"] == ("user.overlay." if user else "trusted.overlay.")
        assert_equal(before, work.look(m.mnt), labels=("before", "layerfs"))
        work.unique_numbers(m.mnt)
    again = snapshot(stack.upper)
    done = flatten(stack)
    assert done.stderr.startswith("layerfs flatten: 0 directories, 0 files and 0 whiteouts")
    assert_equal(again, snapshot(stack.upper), message="a second run changed something")
    assert guard == [snapshot(lower) for lower in stack.lowers]


@pytest.mark.parametrize("worked", [""], indirect=True)
def test_for_fuse_overlayfs(worked: tuple[Stack, Snapshot]) -> None:
    if reason := mounts.why_no_fuse_overlayfs():
        pytest.skip(reason)
    stack, _ = worked
    with Layerfs(stack) as m:
        for fifo in ("fifo", "new-fifo"):  # 1.10 opens them, and waits for a writer
            os.unlink(m.mnt / fifo)
        before = work.look(m.mnt)
    assert flatten(stack).returncode == 0
    with FuseOverlayfs(stack) as m:
        assert_equal(before, work.look(m.mnt), labels=("before", "fuse-overlayfs"), ignore=["nlink", "names"])


@pytest.mark.parametrize("worked", [""], indirect=True)
def test_whiteouts_as_files(worked: tuple[Stack, Snapshot]) -> None:
    """As an upper holds them that was written where devices cannot be made."""
    stack, before = worked
    assert stack.upper is not None
    for here, dirs, files in os.walk(stack.upper):
        for name in files:
            path = Path(here) / name
            st = os.lstat(path)
            if stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
                above = os.stat(here)
                path.unlink()
                (Path(here) / f".wh.{name}").touch()
                os.utime(here, ns=(above.st_atime_ns, above.st_mtime_ns))
        for name in dirs:
            path = Path(here) / name
            if os.listxattr(path) and "trusted.overlay.opaque" in os.listxattr(path):
                above = os.stat(path)
                os.removexattr(path, "trusted.overlay.opaque")
                (path / ".wh..wh..opq").touch()
                os.utime(path, ns=(above.st_atime_ns, above.st_mtime_ns))
    assert kernel_options(stack) is None
    assert flatten(stack).returncode == 0
    assert kernel_options(stack) == []
    with KernelOverlay(stack, "redirect_dir=off,metacopy=off") as m:
        found = work.look(m.mnt)
    assert_equal(before, found, labels=("before", "kernel"), ignore=["mtime_ns"])


@pytest.mark.parametrize("worked", [""], indirect=True)
def test_refused_while_mounted(worked: tuple[Stack, Snapshot]) -> None:
    stack, before = worked
    upper = snapshot(stack.upper)  # type: ignore[arg-type]
    with Layerfs(stack) as m:
        done = flatten(stack)
        assert done.returncode == 1 and "in use by another layerfs mount" in done.stderr
        assert_equal(before, work.look(m.mnt))
    with KernelOverlay(stack):
        done = flatten(stack)
        assert done.returncode == 1 and "in use by the kernel overlay" in done.stderr
    assert_equal(upper, snapshot(stack.upper), ignore=["nlink"])  # type: ignore[arg-type]


def test_wrong_command_lines(root: None, stack: Stack) -> None:
    for argv, code, said in (
        (["--upper", str(stack.upper)], 2, "--lower"),
        (["--lower", str(stack.lowers[0])], 2, "--upper"),
        (["--upper", "/nope", "--lower", str(stack.lowers[0])], 1, "no such directory"),
        (["--upper", str(stack.upper), "--lower", "/nope"], 1, "no such directory"),
    ):
        done = subprocess.run([*layerfs_command(), "flatten", *argv], capture_output=True, text=True)
        assert done.returncode == code and said in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not Path(f"{stack.upper}.work").exists()


KILLER = """
import os, signal, sys
from layerfs.upper import steps
from layerfs.cli.main import main
left = int(sys.argv.pop(1))
def hook(name):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
steps.hook = hook
sys.exit(main())
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("worked", [""], indirect=True)
def test_killed_anywhere(worked: tuple[Stack, Snapshot]) -> None:
    """After a step of it the upper mounts to the same tree; run again it ends, and all is plain."""
    killed_at_each_step(*worked, every=3)


@pytest.mark.parametrize("worked", [""], indirect=True)
def test_killed_here_and_there(worked: tuple[Stack, Snapshot]) -> None:
    killed_at_each_step(*worked, every=29)


def killed_at_each_step(stack: Stack, before: Snapshot, *, every: int) -> None:
    assert stack.upper is not None and stack.work is not None
    saved = stack.dir / "saved"
    saved.mkdir()
    for each in (stack.upper, stack.work):
        subprocess.run(["cp", "-a", "--reflink=auto", each, saved], check=True)
    argv = command(stack)[len(layerfs_command()) :]
    at = 1
    while True:
        done = subprocess.run([sys.executable, "-c", KILLER, str(at), *argv], capture_output=True, text=True)
        with Layerfs(stack) as m:
            assert_equal(before, work.look(m.mnt), message=f"killed at step {at}", ignore=["mtime_ns"])
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert flatten(stack).returncode == 0
        assert kernel_options(stack) == []
        with KernelOverlay(stack, "redirect_dir=off,metacopy=off") as m:
            found = work.look(m.mnt)
        assert_equal(before, found, message=f"killed at step {at}, run again, kernel", ignore=["mtime_ns"])
        for each in (stack.upper, stack.work):
            shutil.rmtree(each)
            subprocess.run(["cp", "-a", "--reflink=auto", saved / each.name, each], check=True)
        at += every
    assert at > 50, "it died nowhere"
