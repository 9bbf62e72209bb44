"""The rows of the README's table of differences that a mount shows, on all three file systems. A row that is
no longer true fails here."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from tests.support.mounts import FuseOverlayfs, KernelOverlay, Layerfs, Mounted, why_no_fuse_overlayfs
from tests.support.stack import Stack

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("kernel_overlay")]

SYSTEMS: dict[str, Callable[[Stack], Mounted]] = {
    "layerfs": Layerfs,
    "fuse-overlayfs": FuseOverlayfs,
    "kernel": lambda stack: KernelOverlay(stack, "redirect_dir=off,metacopy=off,index=off"),
}
#: What each does: (rename of a lower directory, both names of a hard link show a write in the next mount,
#: data copied by a chmod, `.wh.` hides). None: now so, now so; what fuse-overlayfs does to the names shows in
#: podman's commit (`test_podman.py`).
ROWS = {
    "layerfs": ("renamed", True, False, True),
    "fuse-overlayfs": ("EXDEV", None, True, True),
    "kernel": ("EXDEV", False, True, False),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_rows(stack: Stack, name: str) -> None:
    if name == "fuse-overlayfs" and (reason := why_no_fuse_overlayfs()):
        pytest.skip(reason)
    lower, upper = stack.lowers[0], stack.upper
    assert upper is not None
    (lower / "dir/sub").mkdir(parents=True)
    (lower / "one").write_text("old")
    os.link(lower / "one", lower / "two")
    (lower / "big").write_bytes(os.urandom(1 << 20))
    (lower / "gone").write_text("")
    other = stack.dir / "top"
    other.mkdir()
    (other / ".wh.gone").touch()
    stack.lowers.insert(0, other)
    with SYSTEMS[name](stack) as mounted:
        try:
            os.rename(mounted.mnt / "dir", mounted.mnt / "moved")
            renamed = "renamed"
        except OSError as error:
            renamed = errno.errorcode[error.errno or 0]
        with open(mounted.mnt / "one", "a") as file:
            file.write("new")
        (mounted.mnt / "big").chmod(0o600)
        mounted.remount()
        linked = (mounted.mnt / "two").read_text() == "oldnew"
        copied = (upper / "big").stat().st_blocks * 512 >= 1 << 20
        hidden = not (mounted.mnt / "gone").exists()
    wanted = ROWS[name]
    assert (renamed, linked if wanted[1] is not None else None, copied, hidden) == wanted
