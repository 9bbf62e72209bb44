"""Whatever bytes come, readers of layers and images give a value or their own error, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.harness import at_random
from tests.fuzz.targets import TARGETS

SECONDS = int(os.environ.get("LAYERFS_FUZZ_SECONDS", "30"))


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_their_neighbours(name: str) -> None:
    """The same 400 changed seeds every time."""
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        target.read(seed)
    at_random(target.read, seeds, number=400, seconds=60, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_fuzz(name: str, tmp_path: Path) -> None:
    """Guided by coverage where atheris is installed. LAYERFS_FUZZ_SECONDS says for how long."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.harness", name, str(SECONDS), str(corpus)],
        capture_output=True,
        text=True,
        timeout=SECONDS + 200,
        errors="replace",
    )
    broken = "".join(f"\n{path.name}: {path.read_bytes().hex()}" for path in tmp_path.glob("*-*"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}{broken}"
    print(done.stdout[-500:], done.stderr[-700:])
