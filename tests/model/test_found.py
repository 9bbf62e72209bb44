"""What random operations have found, kept as cases of their own; and what they find in kernel overlayfs, so
that its known deviations are known to be seen.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Stack

from . import machine
from .layers import Item
from .machine import Case, Quirks
from .ops import EXCHANGE, NOREPLACE, Op
from .test_model import KERNEL, KERNEL_INDEXED, PLAINEST, example

pytestmark = pytest.mark.usefixtures("root", "kernel_overlay")

ACL = "system.posix_acl_access"

FOUND: dict[str, Case] = {
    "an ACL that is not there can be removed": Case(
        ((Item("d1", "dir"), Item("f1", "socket")),),
        (Op("removexattr", ("d1", ACL, False)), Op("removexattr", ("f1", ACL, False))),
    ),
    "trusted xattrs are root's to list": Case(
        ((Item("d1", "dir", attr=7), Item("f1", "file", attr=3)),),
        (
            *(Op("open", (1, "f1", "n", 0)), Op("su", (2,)), Op("listxattr", ("d1", True))),
            *(Op("listxattr", ("f1", True)), Op("flistxattr", (1,))),
        ),
    ),
    "names of a hard link in a moved directory": Case(
        ((Item("f2/f3/f3", "socket"), Item("f2/f3/f1", "link", to="f2/f3/f3")),),
        (
            *(Op("mkdir", ("f2/d2", 0o755)), Op("mkdir", ("f2/d2/f2", 0o755))),
            Op("rename", ("f2/f3", "f2/d2/f2/f1", 0)),
        ),
    ),
    "names of a hard link in an exchanged directory": Case(
        (
            (Item("f2", "file", data=1),),
            (Item("d2/d1", "file"), Item("f2", "link", to="d2/d1"), Item("d2/f1/f1", "link", to="f2")),
        ),
        (
            *(Op("mkdir", ("f3", 0)), Op("rename", ("f3", "f2", EXCHANGE))),
            Op("rename", ("d2", "f2/d2", 0)),
        ),
    ),
    "a hard link copied up in a moved directory": Case(
        ((Item("f2/f3", "symlink", to="d2/f2"), Item("f2/d1", "link", to="f2/f3")),),
        (
            *(Op("mkdir", ("d2", 0o755)), Op("rename", ("f2", "d2/d1", 0))),
            Op("rename", ("d2/d1/d1", "d1", 0)),
        ),
    ),
    "a removed directory takes attributes": Case(
        ((Item("f1", "dir"), Item("d1", "dir", attr=7)),),
        (
            *(Op("opendir", (0, "f1")), Op("opendir", (1, "d1")), Op("rmdir", ("f1",)), Op("rmdir", ("d1",))),
            *(Op("fchmod", (0, 0o777)), Op("fstat", (0,)), Op("futimens", (1, 946684809123456852))),
            *(Op("fsetxattr", (1, "user.a", 1)), Op("fgetxattr", (1, "user.a")), Op("fstat", (1,))),
        ),
    ),
    "a removed directory keeps its mode": Case(
        ((Item("f3", "file", data=1), Item("d2", "dir", attr=8)),),
        (
            *(Op("rename", ("f3", "d2/f2", 0)), Op("open", (1, "d2", "d", 0))),
            *(Op("rmtree", ("d2",)), Op("fstat", (1,))),
        ),
    ),
    "names that the kernel lists with their own numbers": Case(
        ((Item("f1", "file", data=1), Item("d1", "link", to="f1")),),
        (Op("rename", ("f1", "d2", 0)), Op("mkdir", ("f1", 0o777)), Op("link", ("d1", "f1/f1"))),
    ),
}  # fmt: skip

LEFT_BY_THE_KERNEL: dict[str, Case] = {
    "a hard link that moved": Case(
        ((Item("d1", "file", data=1), Item("f2", "link", to="d1")),),
        (Op("rename", ("f2", "d2", NOREPLACE)),),
    ),
    "a hard link that got another name": Case(
        ((Item("f2", "file"), Item("d2", "link", to="f2"), Item("f3/f1", "dir")),),
        (Op("link", ("d2", "f3/f1/f1")),),
    ),
    "a hard link that was written": Case(
        ((Item("f3", "file", data=1), Item("d1", "link", to="f3")),), (Op("truncate", ("f3", 5000)),)
    ),
    "a file that got a second name": Case(
        ((), (Item("f2", "file", data=1), Item("d2", "char"))),
        (Op("link", ("f2", "f3")), Op("link", ("d2", "f1"))),
    ),
}


def test_found_on_layerfs(ext4: Path) -> None:
    with example(tuple(FOUND.values()), ext4) as ex:
        machine.against_plain(ex, Layerfs, Quirks(), kernel_options=(KERNEL, KERNEL_INDEXED))


def test_found_on_layerfs_ctimes(ext4: Path) -> None:
    with example(tuple(FOUND.values()), ext4) as ex:
        machine.against_plain(ex, Layerfs, Quirks(ctimes=True))


def test_copy_up_moves_ctime_in_the_kernel_and_not_in_layerfs(ext4: Path) -> None:
    case = Case(FILE, (Op("open", (0, "f1", "r+", 0)), Op("fstat", (0,)), Op("read", (0, 0, 10))))
    with example((case,), ext4) as ex, pytest.raises(AssertionError, match="moved in the mount only"):
        machine.against_plain(ex, lambda s: KernelOverlay(s, PLAINEST), Quirks(kernel=True, ctimes=True))
    with example((case,), ext4) as ex:
        machine.against_plain(ex, Layerfs, Quirks(ctimes=True))


def test_found_on_uppers_of_the_kernel(ext4: Path) -> None:
    with example(tuple(LEFT_BY_THE_KERNEL.values()), ext4) as ex:
        machine.after_kernel(ex, Layerfs, KERNEL_INDEXED, lambda case: ())


FILE = ((Item("f1", "file", data=2), Item("d1/f1", "file", data=2)),)

# What kernel overlayfs does otherwise than a plain directory: the options with which it does, the shortest
# case, and what the failure must say.
DEVIATIONS: dict[str, tuple[str, Case, str]] = {
    # Linux 6.18 reads the new data through it; older ones do not even that.
    "a mapping through a descriptor from before the copy-up has the old data": (
        PLAINEST,
        Case(
            FILE,
            (Op("open", (0, "f1", "r", 0)), Op("write_file", ("f1", "w", 10, 1)), Op("map_read", (0, 0))),
        ),
        "map_read differs",
    ),
    "EXDEV for directories without redirect_dir": (
        "redirect_dir=off,metacopy=off,index=on",
        Case(FILE, (Op("rename", ("d1", "d2", 0)),)),
        "EXDEV",
    ),
    "hard links part without index": (
        "redirect_dir=on,metacopy=off,index=off",
        Case(
            ((Item("f1", "file", data=2), Item("f2", "link", to="f1")),),
            (Op("write_file", ("f1", "w", 10, 1)), Op("read_file", ("f2",))),
        ),
        "read_file differs",
    ),
    "with metacopy a later copy-up of the data moves mtime": (
        KERNEL_INDEXED,
        Case(
            FILE,
            (Op("rename", ("f1", "f2", 0)), Op("open", (0, "f2", "r+", 0)), Op("fstat", (0,))),
        ),
        "fstat differs",
    ),
    "a removed directory takes no attributes": (
        PLAINEST,
        Case(
            ((Item("d1", "dir"),),),
            (Op("opendir", (0, "d1")), Op("rmdir", ("d1",)), Op("fchmod", (0, 0o700))),
        ),
        "fchmod differs",
    ),
    "an ACL that is not there cannot be removed": (
        PLAINEST,
        Case(((Item("d1", "dir"),),), (Op("removexattr", ("d1", ACL, False)),)),
        "ENODATA",
    ),
    "whiteouts that are xattrs keep a directory from being removed": (
        PLAINEST,
        Case(((Item("d2/d1", "whiteout", form="xattr"),), (Item("d2/d1", "file"),)), (Op("rmdir", ("d2",)),)),
        "ENOTEMPTY",
    ),
}


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_deviations_of_the_kernel_are_seen(ext4: Path, deviation: str) -> None:
    options, case, told = DEVIATIONS[deviation]

    def kernel(stack: Stack) -> KernelOverlay:
        return KernelOverlay(stack, options)

    with example((case,), ext4) as ex, pytest.raises(AssertionError, match=told):
        machine.against_plain(ex, kernel, Quirks())


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_layerfs_does_not_deviate_so(ext4: Path, deviation: str) -> None:
    with example((DEVIATIONS[deviation][1],), ext4) as ex:
        machine.against_plain(ex, Layerfs, Quirks())
