"""The commands start: what they import is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["run", "layers"])
def test_help(name: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


def test_an_unknown_job_is_an_error_that_names_the_others() -> None:
    command = [sys.executable, BENCHMARKS / "run", "--jobs", "stat,nonsense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no such job: nonsense" in done.stderr
    assert "shapes" in done.stderr
