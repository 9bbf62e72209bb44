"""The whole suite again as an ordinary user: layers, upper and mount are that user's, through fusermount3.

A function that fails for that user on a plain directory too (it needs root) is skipped there; see `conftest`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.mounts import layerfs_command
from tests.support.stack import scratch_root

REPO = Path(__file__).parents[2]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arrangement", ["merged", pytest.param("all-lower", marks=pytest.mark.long)])
def test_posix_suite_as_ordinary_user(ordinary_user: tuple[int, int], arrangement: str) -> None:
    uid, gid = ordinary_user
    home = scratch_root() / f"user-{arrangement}"
    home.mkdir()
    os.chown(home, uid, gid)
    env = {
        **os.environ,
        "HOME": str(home),
        "LAYERFS_TEST_DIR": str(home),
        "LAYERFS": " ".join(layerfs_command()),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    gate = [f"--gate={mounts.gate}"] if mounts.gate is not None else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--no-header", "-rfE"]
        + gate
        + ["--deselect", "tests/posix/test_as_user.py", "-k", f"layerfs-{arrangement}", "tests/posix"],
        user=uid,
        group=gid,
        extra_groups=[],
        env=env,
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0, done.stdout.splitlines()[-1:]
