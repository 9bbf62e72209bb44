"""Random operations on random layers: the same on a mount as on a plain directory (see `machine` for the
laws).

A short run by default; LAYERFS_TEST_LONG=1 makes it long (N for N times as long).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.mounts import KernelOverlay

from . import layers, machine, ops

LONG = int(os.environ.get("LAYERFS_TEST_LONG") or 0)
KERNEL = "redirect_dir=on,metacopy=on"
PLAINEST = "redirect_dir=on,metacopy=off,index=on"  # kernel overlayfs as near to POSIX as it can be
KERNEL_INDEXED = KERNEL + ",index=on"


def budget(short: int) -> settings:
    return settings(
        max_examples=short * 20 * LONG if LONG else short,
        deadline=None,
        print_blob=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


def cases(dialect: str, count: int = 4, size: int = 24) -> st.SearchStrategy[tuple[machine.Case, ...]]:
    case = st.builds(machine.Case, layers.layer_lists(dialect), ops.op_lists(size))
    return layers.padded(case, count).map(lambda drawn: tuple(c for c in drawn if any(c.layers) or c.ops))


@pytest.mark.usefixtures("kernel_overlay")
@budget(40)
@given(cases=cases("kernel"))
def test_kernel_overlay_is_a_fair_oracle(ext4: Path, cases: tuple[machine.Case, ...]) -> None:
    """The machinery itself: kernel overlayfs passes with its documented deviations, and only those, left
    out.
    """
    example = machine.Example(cases, ext4)
    try:
        quirks = machine.Quirks(kernel=True)
        machine.against_plain(example, lambda stack: KernelOverlay(stack, PLAINEST), quirks)
    finally:
        example.stack.remove()
