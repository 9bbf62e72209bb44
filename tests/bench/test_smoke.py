"""A short run of benchmarks/run: everything is right, and no job asks for more requests than it may.

It asserts counts and never times. All jobs run so in scripts/test --long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fsbench.counts import MOST
from benchmarks.fsbench.results import read_json
from tests.support.stack import scratch_root

# Long ones run one after the other: beside others that drop the kernel's caches there is nothing to count.
pytestmark = [pytest.mark.root, pytest.mark.loop, pytest.mark.long]

RUN = Path(__file__).parents[2] / "benchmarks" / "run"
JOBS = "stat,find,read,xattr,create,lowers,ls,append"


def test_short_run(tmp_path: Path, kernel_overlay: None) -> None:
    command = Path(sys.executable).with_name("layerfs")
    if not command.exists():
        pytest.skip("layerfs is not installed as a command")
    told = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, RUN, "--quick", "--jobs", JOBS, "--contenders", "layerfs", "--layerfs", command]
        + ["--json", told, "--scratch", scratch_root()],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read_json(told)
    assert found.failures == []
    assert found.wrong() == []
    if "requests are not counted" in done.stderr:
        pytest.skip("no tracefs here: requests were not counted")
    counted = {key: one.requests_each("layerfs") for key, one in found.measures.items() if key in MOST}
    assert len(counted) > 15
    assert all(each is not None for each in counted.values()), counted
    assert counted["warm_present"] == counted["warm_absent"] == 0
    assert counted["cold_present"] >= 1  # what is counted is really this mount's
