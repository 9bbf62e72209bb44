"""Lowers inside other stacks and images: the work gives what it gives on a plain copy of the same tree."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.overlay import work
from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Stack
from tests.support.tree import assert_equal

from .below import SHOWN, Show


@pytest.fixture(autouse=True)
def needs(kernel_overlay: None) -> None:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)


@pytest.fixture(params=SHOWN)
def shown(request: pytest.FixtureRequest, make_stack: type[Stack]) -> Iterator[Path]:
    """The tree of `work`, two layers merged, seen through something else."""
    show: Show = SHOWN[request.param]
    stack = make_stack(n_lowers=2, name="below")
    work.lay_out(stack)
    with show(stack) as path:
        yield path


def copy_of(tree: Path, stack: Stack) -> Path:
    subprocess.run(["cp", "-a", "--sparse=always", f"{tree}/.", stack.mnt], check=True)
    return stack.mnt


def test_work_over(request: pytest.FixtureRequest, shown: Path, make_stack: type[Stack]) -> None:
    """Copy-up, renames, whiteouts, hard links: as on a plain copy, before and after a remount; what lies
    below is never touched.
    """
    began = time.time_ns() - 10**9
    plain = copy_of(shown, make_stack(n_lowers=0, name="plain"))
    stack = make_stack(n_lowers=0)
    stack.lowers = [shown]
    below = work.look(shown)
    with Layerfs(stack) as m:
        first = work.look(m.mnt)  # the root itself is the upper's, and new
        assert_equal(
            work.look(plain), first, recent_ns=began, labels=("plain", "layerfs"), message="at first"
        )
        before = work.unique_numbers(m.mnt)
        work.work_in(plain)
        work.work_in(m.mnt)
        live = work.look(m.mnt)
        assert_equal(work.look(plain), live, recent_ns=began, labels=("plain", "layerfs"))
        numbers = work.unique_numbers(m.mnt)
        for name in work.KEEP_NUMBER:
            assert numbers[name] == before[name], name
        m.remount()
        assert_equal(live, work.look(m.mnt), message="after remount")
        assert work.unique_numbers(m.mnt) == numbers
    # fuse-overlayfs tells another link count from time to time, with nobody above it.
    varies = ["nlink"] if request.node.callspec.params["shown"] == "fuse-overlayfs" else []
    assert_equal(
        below, work.look(shown), strict=["ino"], ignore=varies, message="what lies below was changed"
    )


def test_open_files_over(shown: Path, make_stack: type[Stack]) -> None:
    """Mapped and opened before the copy-up, by two names: all see what is written after it."""
    stack = make_stack(n_lowers=0)
    stack.lowers = [shown]
    with Layerfs(stack) as m, ExitStack() as end:
        reader = os.open(m.mnt / "big", os.O_RDONLY)
        end.callback(os.close, reader)
        seen = end.enter_context(mmap.mmap(reader, 0, prot=mmap.PROT_READ))
        first = seen[:10]
        assert first == work.BIG[:10]
        linked = os.open(m.mnt / "link-b", os.O_RDONLY)
        end.callback(os.close, linked)
        work.write(m.mnt / "big", b"CHANGED")
        work.write(m.mnt / "link-a", b"LINKED")
        assert os.pread(reader, 7, 0) == b"CHANGED" and seen[:7] == b"CHANGED"
        assert os.pread(linked, 6, 0) == b"LINKED"
        writer = os.open(m.mnt / "dir" / "sub" / "deep" / "h", os.O_RDWR)
        end.callback(os.close, writer)
        with mmap.mmap(writer, 0) as shared:
            shared[:4] = b"HHHH"
            shared.flush()
        assert (m.mnt / "dir/sub/deep/h").read_bytes()[:5] == b"HHHHh"
        os.unlink(m.mnt / "dir" / "sub" / "deep" / "h")
        assert os.pread(writer, 5, 0) == b"HHHHh" and os.fstat(writer).st_nlink == 0
        os.rename(m.mnt / "dir", m.mnt / "dir-moved")
        assert (m.mnt / "dir-moved" / "sub" / "g").read_bytes() == b"g"


def test_deeper_than_the_kernel_stacks(make_stack: type[Stack]) -> None:
    """Kernel overlayfs counts how deep it is stacked, two at most; a FUSE mount is the ground again. So six
    stacks in turn can lie on each other, and a change in the top one passes through all.
    """
    with ExitStack() as end:
        bottom = make_stack(n_lowers=2)
        work.lay_out(bottom)
        below = end.enter_context(KernelOverlay(bottom)).mnt
        for system in (KernelOverlay, Layerfs, KernelOverlay, KernelOverlay, Layerfs, Layerfs):
            stack = make_stack(n_lowers=0)
            stack.lowers = [below]
            below = end.enter_context(system(stack)).mnt
        assert (below / "dir" / "f").read_bytes() == b"f"
        work.work_in(below)
        assert (below / "arrived" / "from-top").read_bytes() == b"top"
        assert (bottom.mnt / "dir" / "f").read_bytes() == b"f"


def test_a_layer_of_several_in_each(make_stack: type[Stack]) -> None:
    """One lower from each, a directory through all of them."""
    began = time.time_ns() - 10**9
    with ExitStack() as end:
        stack = make_stack(n_lowers=0)
        for number, show in enumerate(SHOWN.values()):
            below = make_stack(n_lowers=2, name="below")
            (below.lowers[0] / "d").mkdir()
            (below.lowers[1] / "d").mkdir()
            (below.lowers[0] / "d" / f"top{number}").write_text(str(number))
            (below.lowers[1] / "d" / f"low{number}").write_text(str(number))
            (below.lowers[1] / "d" / "same").write_text(str(number))
            stack.lowers.append(end.enter_context(show(below)))
        plain = make_stack(n_lowers=0, name="plain").mnt
        for lower in reversed(stack.lowers):
            subprocess.run(["cp", "-a", f"{lower}/.", plain], check=True)
        with Layerfs(stack) as m:
            work.unique_numbers(m.mnt)
            for where in (plain, m.mnt):
                for number in range(len(stack.lowers)):
                    with open(where / "d" / f"low{number}", "a") as file:
                        file.write("+")
                    os.unlink(where / "d" / f"top{number}")
                os.rename(where / "d", where / "e")
                (where / "e" / "same").write_text("all")
            assert_equal(work.look(plain), work.look(m.mnt), recent_ns=began, labels=("plain", "layerfs"))
