"""Uppers made without privilege: as an ordinary user through fusermount3, as root of a user namespace with
one id, and with subordinate ones. Which forms are in them, and that root of the host goes on with them.
"""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.overlay.rootless_work import TREE
from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs, layerfs_command
from tests.support.stack import Stack, scratch_root
from tests.support.tree import Snapshot, assert_equal, snapshot

USER = 65534
FIRST, COUNT = 2_000_000, 65_536
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Situation:
    """How a command is started in it. `owners`: there are other ids to give files to."""

    name: str
    prefix: tuple[str, ...]
    owners: bool = False

    def __str__(self) -> str:
        return self.name


SITUATIONS = [
    Situation("user", ()),
    Situation("namespace", ("unshare", "-Urm")),
    Situation("subordinate", ("unshare", "-Urm", "--map-auto"), owners=True),
]


@pytest.fixture(scope="module")
def subordinate_ids() -> Iterator[None]:
    """Ranges for USER in /etc/subuid and /etc/subgid, in this run's own mount namespace."""
    made = []
    for name in ("subuid", "subgid"):
        file = scratch_root() / name
        file.write_text(f"{USER}:{FIRST}:{COUNT}\nnobody:{FIRST}:{COUNT}\n")
        file.chmod(0o644)
        if os.path.exists(f"/etc/{name}"):
            mounts.bind(file, f"/etc/{name}")
            made.append(f"/etc/{name}")
    yield
    for path in made:
        mounts.umount(path)


def as_user(*argv: str, stack: Stack, mark: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        argv,
        user=USER,
        group=USER,
        extra_groups=[],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        env={**os.environ, **mark, "HOME": str(stack.dir), "PYTHONDONTWRITEBYTECODE": "1"},
    )


@cache
def why_not(situation: Situation) -> str | None:
    """Why nothing can be done in it here; tried with what is not ours."""
    if situation.prefix and not shutil.which("newuidmap") and situation.owners:
        return "no newuidmap (package uidmap)"
    done = subprocess.run(
        [*situation.prefix, "true"], user=USER, group=USER, extra_groups=[], capture_output=True, text=True
    )
    return f"{shlex.join(situation.prefix)}: {done.stderr.strip()}" if done.returncode else None


def seen(situation: Situation, stack: Stack, options: str) -> tuple[list[tuple[int, int]], Snapshot]:
    """What the work in the mount, made and taken away there, shows."""
    assert stack.upper is not None
    layers = [word for lower in stack.lowers for word in ("--lower", str(lower))]
    mount = [*layerfs_command(), "mount", *layers, "--upper", str(stack.upper), "--work", str(stack.work)]
    mount += [*(["-o", options] if options else []), str(stack.mnt)]
    script = (
        f"{shlex.join(mount)} && {worker(stack.mnt, situation)};"
        f"code=$?; {shlex.join([*layerfs_command(), 'umount', str(stack.mnt)])} && exit $code"
    )
    return run(situation, script, stack)


def worker(where: Path, situation: Situation) -> str:
    words = [sys.executable, "-m", "tests.overlay.rootless_work", str(where)]
    return shlex.join([*words, "owners" if situation.owners else "none"])


def run(situation: Situation, script: str, stack: Stack) -> tuple[list[tuple[int, int]], Snapshot]:
    mark = {mounts.SESSION_MARK: mounts.session_id}
    done = as_user(*situation.prefix, "sh", "-c", script, stack=stack, mark=mark)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
    found: tuple[list[tuple[int, int]], Snapshot] = pickle.loads(done.stdout)
    return found


@pytest.fixture
def laid_out(root: None, make_stack: type[Stack], subordinate_ids: None) -> Stack:
    stack = make_stack(n_lowers=1, owner=(USER, USER))
    stack.write(stack.lowers[0], TREE)
    return stack


def check_forms(situation: Situation, upper: Path) -> None:
    """The table of FORMAT.md, "Without privilege"."""
    assert os.getxattr(upper, "user.overlay.layerfs.upper") == b"y"
    gone = os.lstat(upper / "gone")
    assert stat.S_ISCHR(gone.st_mode) and gone.st_rdev == 0, "whiteouts are devices: anybody may make 0/0"
    assert os.getxattr(upper / "opaque", "user.overlay.opaque") == b"y"
    assert os.stat(upper / "opaque/new").st_uid == USER
    if situation.owners:
        assert (os.stat(upper / "moved/a").st_uid, os.stat(upper / "moved/a").st_gid) == (
            FIRST + 4,
            FIRST + 5,
        )
        assert os.lstat(upper / "link2").st_uid == FIRST + 8
    for here, dirs, files in os.walk(upper):
        for name in (*dirs, *files):
            present = os.listxattr(os.path.join(here, name), follow_symlinks=False)
            assert not any(each.startswith("trusted.") for each in present)


@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
@pytest.mark.parametrize("options", ["", "redirect_dir=off,metacopy=off"], ids=["marks", "plain"])
def test_upper(laid_out: Stack, make_stack: type[Stack], situation: Situation, options: str) -> None:
    """As in a plain directory there; then root's: with layerfs, and a plain one with kernel overlayfs."""
    if reason := mounts.why_no_layerfs(USER) or why_not(situation):
        pytest.skip(reason)
    stack = laid_out
    oracle = make_stack(n_lowers=0, writable=False, owner=(USER, USER))
    oracle.write(oracle.mnt, TREE)
    want_refused, want = run(situation, worker(oracle.mnt, situation), oracle)
    guard = snapshot(stack.lowers[0])
    refused, tree = seen(situation, stack, options)
    labels = ("plain directory", "layerfs")
    assert refused == want_refused
    for found in (want, tree):
        del found[b"."]  # its times are the upper's
    assert_equal(want, tree, ignore=["mtime_ns"], labels=labels)
    assert_equal(guard, snapshot(stack.lowers[0]), message="a lower was changed")
    assert stack.upper is not None
    check_forms(situation, stack.upper)

    plain = snapshot(oracle.mnt)
    ignore = ["mtime_ns"]
    hide = [b"."]
    if options:
        with KernelOverlay(stack, "userxattr") as m:
            assert_equal(without(plain, hide), without(snapshot(m.mnt), hide), ignore=ignore)
    with Layerfs(stack) as m:
        assert m.info()["xattr_prefix"] == "user.overlay."
        assert_equal(without(plain, hide), without(snapshot(m.mnt), hide), ignore=ignore)
        (m.mnt / "by-root").write_text("root")
        os.unlink(m.mnt / "hard2")
        os.chown(m.mnt / "big", 3, 4)
    names = os.listxattr(stack.upper)
    assert not any(name.startswith("trusted.overlay.") for name in names)
    # And back: what root made is there, though no longer theirs to change.
    with Layerfs(stack, as_user=None) as m:
        assert (m.mnt / "by-root").read_text() == "root" and not (m.mnt / "hard2").exists()


def without(tree: Snapshot, names: list[bytes]) -> Snapshot:
    return {name: entry for name, entry in tree.items() if name not in names}


def test_users_of_a_root_mount_cannot_say_that_it_is_a_users(root: None, stack: Stack) -> None:
    """The mark on an upper's root steers what root's next mount reads: nobody sets it through a mount."""
    with Layerfs(stack) as m:
        assert stack.upper is not None
        os.setxattr(m.mnt, "user.overlay.layerfs.upper", b"y")
        assert os.listxattr(m.mnt) == ["user.overlay.layerfs.upper"]
        os.mkdir(m.mnt / "d")
        assert "user.overlay.layerfs.upper" not in os.listxattr(stack.upper)
        m.remount()
        assert m.info()["xattr_prefix"] == "trusted.overlay."
        assert os.getxattr(m.mnt, "user.overlay.layerfs.upper") == b"y"
        os.removexattr(m.mnt, "user.overlay.layerfs.upper")
        assert os.listxattr(m.mnt) == []
