"""The power goes at every step that an operation takes on disk: the file system of the upper is shut down
without a flush of its log, mounted again, and shows the old tree or the new one. What was fsynced before is
there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import mounts

from .harness import Ground, Scenario, Trial, Zygote, loop_ground
from .scenarios import SCENARIOS, lay_out

LONG = int(os.environ.get("LAYERFS_TEST_LONG") or 0)
# Every kind of step once; the long run takes all scenarios.
SHORT = {
    *("append", "append-deep", "chmod", "fill-metacopy", "truncate", "unlink", "rmdir-merged"),
    *("mkdir-over-whiteout", "links-append", "rename-file", "rename-dir", "exchange-file-dir"),
}
CHOSEN = [s for s in SCENARIOS if LONG or s.name in SHORT]


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    kind = request.param
    if mounts.why_not_root() or not shutil.which(f"mkfs.{kind}") or not shutil.which("losetup"):
        pytest.skip(f"needs root, losetup and mkfs.{kind}")
    # Outside of the scratch directory: a mount in there would count as left behind by a test.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    top = Path(tempfile.mkdtemp(prefix="layerfs-power-", dir=memory))
    try:
        with loop_ground(kind, top, 400 << 20) as made:
            yield made
    finally:
        shutil.rmtree(top)


@pytest.mark.parametrize("scenario", CHOSEN, ids=str)
def test_old_or_new_after_a_power_cut(zygote: Zygote, ground: Ground, scenario: Scenario) -> None:
    trial = Trial(zygote, ground, scenario, lay_out)
    try:
        problems = []
        for number, name in enumerate(trial.steps, 1):
            trial.die_at(number)
            try:
                trial.check(f"power cut at step {number} of {len(trial.steps)}, {name}")
            except (AssertionError, OSError, RuntimeError) as problem:
                problems.append(f"{type(problem).__name__}: {problem}")
        assert not problems, "\n".join(problems)
    finally:
        trial.remove()


@pytest.mark.parametrize("scenario", [s for s in CHOSEN if s.result], ids=str)
def test_what_was_fsynced_is_there(zygote: Zygote, ground: Ground, scenario: Scenario) -> None:
    """The operation, fsync of its result, power cut: the new tree is there."""
    trial = Trial(zygote, ground, scenario, lay_out)
    try:
        trial.cut_after_fsync()
        trial.check("power cut after fsync", only_new=True)
    finally:
        trial.remove()
