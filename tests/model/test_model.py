"""Random operations on random layers: the same on a mount as on a plain directory (see `machine` for the
laws).

A short run by default; LAYERFS_TEST_LONG=1 makes it long (N for N times as long).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs

from . import generate, machine, ops

LONG = int(os.environ.get("LAYERFS_TEST_LONG") or 0)
PLAINEST = "redirect_dir=on,metacopy=off,index=on"  # kernel overlayfs as near to POSIX as it can be
KERNEL = "redirect_dir=on,metacopy=on,index=off"
KERNEL_INDEXED = "redirect_dir=on,metacopy=on,index=on"

pytestmark = pytest.mark.usefixtures("root")


def budget(short: int) -> settings:
    return settings(
        max_examples=short * 20 * LONG if LONG else short,
        deadline=None,
        print_blob=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


@contextlib.contextmanager
def example(
    cases: tuple[machine.Case, ...], base: Path, for_kernel: bool = True, user_marks: bool = False
) -> Iterator[machine.Example]:
    made = machine.Example(cases, base, for_kernel, user_marks)
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):  # a failure that left it mounted is told by its own exception
            if not mounts.mounts_below(made.stack.dir):
                made.stack.remove()


@pytest.fixture(scope="module")
def caches_dropped() -> Iterator[None]:
    """Meanwhile another process makes the kernel drop its dentries and inodes, again and again."""
    script = (
        "import time\n"
        "while True:\n"
        "    with open('/proc/sys/vm/drop_caches', 'w') as f: f.write('2')\n"
        "    time.sleep(0.002)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={k: v for k, v in os.environ.items() if k != mounts.SESSION_MARK}
    )
    try:
        yield
        assert process.poll() is None, "caches cannot be dropped here"
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("kernel_overlay")
@budget(10)
@given(cases=generate.cases("kernel"))
def test_kernel_overlay_is_a_fair_oracle(ext4: Path, cases: tuple[machine.Case, ...]) -> None:
    """The machinery itself: kernel overlayfs passes with its documented deviations, and only those, left
    out.
    """
    with example(cases, ext4) as ex:
        machine.against_plain(ex, lambda stack: KernelOverlay(stack, PLAINEST), machine.Quirks(kernel=True))


@pytest.mark.usefixtures("kernel_overlay")
@budget(14)
@given(cases=generate.cases("xattr"))
def test_like_a_plain_directory_and_readable_by_the_kernel(
    ext4: Path, cases: tuple[machine.Case, ...]
) -> None:
    with example(cases, ext4) as ex:
        machine.against_plain(ex, Layerfs, machine.Quirks(), kernel_options=(KERNEL, KERNEL_INDEXED))


@budget(14)
@given(cases=generate.cases("oci"))
def test_like_a_plain_directory_on_oci_layers(ext4: Path, cases: tuple[machine.Case, ...]) -> None:
    with example(cases, ext4, for_kernel=False) as ex:
        machine.against_plain(ex, Layerfs, machine.Quirks())


@budget(10)
@given(cases=generate.cases("oci"))
def test_like_a_plain_directory_while_caches_are_dropped(
    ext4: Path, caches_dropped: None, cases: tuple[machine.Case, ...]
) -> None:
    with example(cases, ext4, for_kernel=False) as ex:
        machine.against_plain(ex, Layerfs, machine.Quirks())


@budget(6)
@given(cases=generate.cases("oci"))
def test_like_a_plain_directory_with_user_xattrs(ext4: Path, cases: tuple[machine.Case, ...]) -> None:
    with example(cases, ext4, for_kernel=False, user_marks=True) as ex:
        machine.against_plain(ex, lambda stack: Layerfs(stack, "userxattr"), machine.Quirks())


@pytest.mark.usefixtures("kernel_overlay")
@budget(8)
@given(cases=generate.cases("xattr"))
def test_user_xattrs_without_redirects_are_readable_by_the_kernel(
    ext4: Path, cases: tuple[machine.Case, ...]
) -> None:
    options = "userxattr,redirect_dir=off,metacopy=off"
    with example(cases, ext4, user_marks=True) as ex:
        machine.against_plain(
            ex, lambda stack: Layerfs(stack, options), machine.Quirks(), kernel_options=("userxattr",)
        )


@budget(6)
@given(cases=generate.cases("oci"))
def test_ctimes_move_as_in_a_plain_directory(ext4: Path, cases: tuple[machine.Case, ...]) -> None:
    with example(cases, ext4, for_kernel=False) as ex:
        machine.against_plain(ex, Layerfs, machine.Quirks(ctimes=True))


@pytest.mark.usefixtures("kernel_overlay")
@budget(10)
@given(cases=generate.cases("kernel", ops=20), more=st.tuples(*[generate.more_ops(16)] * 4))
def test_goes_on_where_the_kernel_stopped(
    ext4: Path, cases: tuple[machine.Case, ...], more: tuple[tuple[ops.Op, ...], ...]
) -> None:
    with example(cases, ext4) as ex:
        then = dict(zip(map(id, cases), more, strict=False))
        machine.after_kernel(ex, Layerfs, KERNEL_INDEXED, lambda case: then[id(case)])


@pytest.mark.usefixtures("kernel_overlay")
@budget(10)
@given(cases=generate.cases("kernel", ops=20, links=False), more=st.tuples(*[generate.more_ops(16)] * 4))
def test_goes_on_where_the_kernel_without_index_stopped(
    ext4: Path, cases: tuple[machine.Case, ...], more: tuple[tuple[ops.Op, ...], ...]
) -> None:
    """Without hard links in the lowers: without the index the kernel parts them."""
    with example(cases, ext4) as ex:
        then = dict(zip(map(id, cases), more, strict=False))
        machine.after_kernel(ex, Layerfs, KERNEL, lambda case: then[id(case)])
