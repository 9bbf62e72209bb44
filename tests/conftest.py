"""What holds for every test: the header of facts, a private mount namespace, and no test leaves anything
behind.

A mount or layerfs process that a test leaves over, or a warning or traceback in a daemon's log, fails that
test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.gate import passthrough
from tests.support import mounts
from tests.support.stack import Stack, scratch_root, set_scratch_root

_namespace: str | None = "not tried"
#: What holds the file system of --file-system.
_holder: Path | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared-mounts",
        action="store_true",
        help="mount in the caller's mount namespace, to look at the mounts from outside",
    )
    parser.addoption(
        "--drop-caches",
        action="store_true",
        help="have the kernel drop dentries, inodes and pages all the time: names must not get lost",
    )
    parser.addoption(
        "--file-system",
        metavar="KIND",
        help="work on a fresh one of this kind: tmpfs, overlay, ext4, xfs, xfs-noreflink, btrfs (as root)",
    )
    parser.addoption(
        "--gate",
        choices=["on", "off"],
        help="mount layerfs with or without its native gate; otherwise as it likes",
    )
    parser.addoption(
        "--data",
        choices=["cached", "passthrough"],
        help="have layerfs mounts move the bytes of files so; otherwise as they like",
    )
    parser.addoption("--keep-stacks", action="store_true", help="do not delete the directories of the tests")


def pytest_configure(config: pytest.Config) -> None:
    global _namespace
    mounts.gate = config.getoption("--gate")
    mounts.data = config.getoption("--data")
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    if mounts.data == "passthrough" and (reason := passthrough.obstacle()):
        pytest.exit(f"skipped: no passthrough here: {reason}", returncode=0)
    os.environ[mounts.SESSION_MARK] = mounts.session_id
    scratch_root()
    _namespace = (
        "shared, as asked" if config.getoption("--shared-mounts") else mounts.private_mount_namespace()
    )
    if kind := config.getoption("--file-system"):
        _work_on(kind)


def _work_on(kind: str) -> None:
    """All stacks of this run lie on a new file system, which goes with the mount namespace."""
    from tests.overlay.loops import make_file_system

    global _holder
    if _namespace is not None:
        pytest.exit(f"--file-system needs a mount namespace of its own: {_namespace}", returncode=4)
    _holder = scratch_root()
    target = _holder / kind
    target.mkdir()
    try:
        make_file_system(kind, 4 << 30, _holder / "image", target)
    except KeyError:
        shutil.rmtree(_holder)
        pytest.exit(f"--file-system {kind}: no such kind", returncode=4)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(_holder)
        pytest.exit(f"skipped: {kind} cannot be had here: {error}", returncode=0)
    os.environ["LAYERFS_TEST_ORACLES"] = str(_holder)
    set_scratch_root(target)


def pytest_report_header(config: pytest.Config) -> list[str]:
    if config.option.collectonly:
        return []
    state = "private" if _namespace is None else f"the caller's ({_namespace})"
    return [*mounts.facts(), f"mount namespace: {state}"]


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.option.collectonly:
        return
    for line in mounts.sweep():
        print(f"left over at the end: {line}")
    if not config.getoption("--keep-stacks"):
        root = scratch_root()
        if not [m for m in mounts.mounts_below(root) if m[0] != str(root)]:
            shutil.rmtree(root, ignore_errors=True)
        set_scratch_root(None)
    if _holder is not None:
        mounts.umount(_holder / config.getoption("--file-system"), mounts.MNT_DETACH)
        shutil.rmtree(_holder, ignore_errors=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Wider-scoped mounts are closed by now: whatever is still there is a leak that fails the run."""
    if session.config.option.collectonly:
        return
    if left := mounts.sweep():
        print("\nLEFT OVER after the last test:\n  " + "\n  ".join(left))
        session.exitstatus = 1


@pytest.fixture(scope="session", autouse=True)
def _drop_caches(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process of its own that drops the kernel's caches ten times a second, when --drop-caches asks for
    it."""
    if not request.config.getoption("--drop-caches"):
        yield
        return
    loop = "while kill -0 $PPID 2>/dev/null; do echo 3 > /proc/sys/vm/drop_caches; sleep 0.1; done"
    env = {k: v for k, v in os.environ.items() if k != mounts.SESSION_MARK}  # it is meant to stay
    dropper = subprocess.Popen(["sh", "-c", loop], env=env)
    try:
        yield
        assert dropper.poll() is None, "cannot write /proc/sys/vm/drop_caches"
    finally:
        dropper.kill()
        dropper.wait()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = list(mounts.live)
    yield
    wrong = mounts.sweep(keep=before)
    for m in before:
        if isinstance(m, mounts.Layerfs) and m in mounts.live and (said := m.new_complaints()):
            wrong.append(f"{m} logged:\n{said}")
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


@pytest.fixture
def stack() -> Iterator[Stack]:
    """A stack with one lower, upper and work; removed afterwards. Make others with `make_stack`."""
    s = Stack()
    yield s
    _remove(s)


@pytest.fixture
def make_stack(request: pytest.FixtureRequest) -> Iterator[type[Stack]]:
    """`Stack`, with every instance made by this test removed afterwards."""
    made: list[Stack] = []

    class Remembered(Stack):
        def __init__(self, *args: object, **kw: object) -> None:
            super().__init__(*args, **kw)  # type: ignore[arg-type]
            made.append(self)

    yield Remembered
    if not request.config.getoption("--keep-stacks"):
        for s in made:
            _remove(s)


def _remove(s: Stack) -> None:
    if s.dir.exists() and not mounts.mounts_below(s.dir):
        s.remove()


@pytest.fixture
def root() -> None:
    if reason := mounts.why_not_root():
        pytest.skip(reason)


@pytest.fixture
def kernel_overlay(root: None) -> None:
    """The test needs kernel overlayfs."""
    if reason := mounts.why_no_kernel_overlay():
        pytest.skip(reason)


@pytest.fixture
def ordinary_user(root: None) -> tuple[int, int]:
    """(uid, gid) of an ordinary user who may open /dev/fuse; for `Layerfs(as_user=...)` and
    `Stack(owner=...)`.
    """
    uid = 65534
    if reason := mounts.why_no_layerfs(uid):
        pytest.skip(reason)
    return uid, uid
