"""Real commands in a box: directories for one mount, runs as root or as an ordinary user, and what must not
be left.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from layerfs.fdutil import fs_magic
from layerfs.runtime.mounts import FUSE_SUPER_MAGIC
from tests.support import mounts
from tests.support.processes import eventually
from tests.support.stack import scratch_root

USER = 65534
PATIENCE = 20.0

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Box:
    """Directories `a`, `b` (lowers), `u`, `w` (upper, work), `m` (mount point) below `dir`, and commands as
    `uid`.
    """

    dir: Path
    uid: int
    env: dict[str, str] = field(default_factory=dict)

    def path(self, name: str) -> str:
        return str(self.dir / name)

    def __call__(self, name: str) -> str:
        return self.path(name)

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    def own(self, path: str | Path) -> None:
        os.chown(path, self.uid, self.uid)

    def mkdir(self, name: str, mode: int = 0o755) -> str:
        path = self.dir / name
        path.mkdir(parents=True)
        path.chmod(mode)
        self.own(path)
        return str(path)

    def popen(self, *argv: str, **how: object) -> subprocess.Popen[str]:
        who: dict[str, object] = {}
        if self.uid != os.geteuid():
            who = {"user": self.uid, "group": self.uid, "extra_groups": []}
        defaults: dict[str, object] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "errors": "replace",
            "cwd": "/",
            "env": os.environ | {"HOME": str(self.dir), "LC_ALL": "C.UTF-8"} | self.env,
        }
        return subprocess.Popen(list(argv), **(defaults | who | how))  # type: ignore[call-overload,no-any-return]

    def run(self, *argv: str, timeout: float = PATIENCE, **how: object) -> subprocess.CompletedProcess[str]:
        process = self.popen(*argv, **how)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def layerfs(self, *arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
        return self.run(*mounts.layerfs_command(), *arguments, **how)  # type: ignore[arg-type]

    def helper(self, *arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
        return self.run(*helper_command(), *arguments, **how)  # type: ignore[arg-type]

    def mount(self, *more: str, **how: object) -> None:
        """A writable mount of a, b, u, w on m."""
        arguments = ["--lower", self("a"), "--lower", self("b"), "--upper", self("u"), "--work", self("w")]
        done = self.layerfs("mount", *arguments, *more, self("m"), **how)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert self.is_mounted()

    def umount(self) -> None:
        done = self.layerfs("umount", self("m"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr

    def mounted(self) -> list[tuple[str, str]]:
        return mounts.mounts_below(self.dir)

    def is_mounted(self) -> bool:
        return (self("m"), "fuse.layerfs") in self.mounted() and self.as_user(
            lambda: fs_magic(self("m")) == FUSE_SUPER_MAGIC
        )

    def as_user(self, question: Callable[[], bool]) -> bool:
        """Answer `question` in a child with the box's uid: root may not look into a user's mount."""
        if self.uid == os.geteuid():
            return question()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgroups([])
                os.setresgid(self.uid, self.uid, self.uid)
                os.setresuid(self.uid, self.uid, self.uid)
                code = 0 if question() else 1
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1] == 0

    def daemons(self) -> list[int]:
        """Processes that were started in this box and still run."""
        return mounts.marked_processes(self.env[mounts.MOUNT_MARK], mounts.MOUNT_MARK)

    def daemon(self) -> int:
        (pid,) = self.daemons()
        return pid

    def kill(self, how: signal.Signals) -> None:
        pid = self.daemon()
        os.kill(pid, how)
        assert eventually(lambda: pid not in self.daemons()), f"survived {how.name}"

    def is_free(self, name: str) -> bool:
        """Nobody holds a lock on directory `name` or its lock file."""
        for path in (self.dir / name, self.dir / name / "layerfs.lock"):
            try:
                fd = os.open(path, os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            finally:
                os.close(fd)
        return True

    def assert_gone(self) -> None:
        assert eventually(lambda: not self.daemons()), f"processes left: {self.daemons()}"
        assert (self("m"), "fuse.layerfs") not in self.mounted()
        # A process that ends shows no environment a moment before it lets go of its locks.
        assert eventually(lambda: self.is_free("u") and self.is_free("w"), 2)

    def close(self) -> None:
        for pid in self.daemons():
            os.kill(pid, signal.SIGKILL)
        for point, _ in reversed(self.mounted()):  # also those that a test made for itself
            _libc.umount2(os.fsencode(point), 2)
        eventually(lambda: not self.daemons())


def helper_command() -> list[str]:
    """mount.layerfs beside the layerfs that is tested."""
    command = mounts.layerfs_command()
    installed = Path(command[0]).with_name("mount.layerfs")
    if installed.exists():
        return [str(installed)]
    return [sys.executable, "-c", "import sys; from layerfs.cli.mount_helper import main; sys.exit(main())"]


def why_not_as(uid: int) -> str | None:
    """Why commands cannot be run as `uid` here, or None."""
    if uid == os.geteuid():
        return mounts.why_no_layerfs()
    if os.geteuid() != 0:
        return "only root can be somebody else"
    try:
        subprocess.run(
            [*mounts.layerfs_command(), "--version"],
            user=uid,
            group=uid,
            extra_groups=[],
            cwd="/",
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"uid {uid} cannot run layerfs: {error}"
    return mounts.why_no_layerfs(uid)


_boxes = 0


def make_box(uid: int) -> Box:
    global _boxes
    if reason := why_not_as(uid):
        pytest.skip(reason)
    _boxes += 1
    top = scratch_root() / f"box{_boxes}"
    top.mkdir(mode=0o755)
    box = Box(top, uid)
    box.own(top)
    box.env[mounts.MOUNT_MARK] = f"{mounts.session_id}-box{_boxes}"
    for name in ("a", "b", "u", "w", "m"):
        box.mkdir(name)
    for layer in ("a", "b"):
        (top / layer / f"in-{layer}").write_text(layer)
        box.own(top / layer / f"in-{layer}")
    return box


@pytest.fixture(params=["root", "user"])
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """One for root and one for an ordinary user; run by an ordinary user only the latter."""
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("not root")
    made = make_box(0 if request.param == "root" else (USER if os.geteuid() == 0 else os.geteuid()))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def root_box() -> Iterator[Box]:
    if os.geteuid() != 0:
        pytest.skip("not root")
    made = make_box(0)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def user_box() -> Iterator[Box]:
    made = make_box(USER if os.geteuid() == 0 else os.geteuid())
    try:
        yield made
    finally:
        made.close()
