"""Where real programs are run: the merged view of some layers, as a plain directory (the control: a test that
fails there is wrong itself) and on layerfs. What the programs do stands in the test files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.mounts import Layerfs, Mounted, PlainDir, why_no_layerfs
from tests.support.stack import Stack
from tests.support.tree import lowers_guard

Place = Callable[..., Mounted]

TIMEOUT = 300  # seconds for one program; the test's own limit is longer


def run(
    command: Sequence[str | Path], cwd: Path | None = None, *, check: bool = True, **more: object
) -> subprocess.CompletedProcess[str]:
    """A program that must end well: its output is the failure's message."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        check=False,
        **more,  # type: ignore[call-overload]
    )
    if check and done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        pytest.fail(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{said}", pytrace=False)
    return done


@pytest.fixture
def needs() -> Callable[..., None]:
    """Skips the test, by name, when a program is not installed."""

    def skip_without(*programs: str) -> None:
        if absent := [name for name in programs if not shutil.which(name)]:
            pytest.skip(f"not installed: {', '.join(absent)}")

    return skip_without


@pytest.fixture(params=["plain", "layerfs"])
def place(request: pytest.FixtureRequest, make_stack: type[Stack]) -> Iterator[Place]:
    """Makes the place: `place(*lowers)` shows these directories (top first) merged, and writable.

    The plain directory is a copy of the lowers, made by cp, bottom first; the lowers must then hold no
    whiteouts. On layerfs the lowers are compared afterwards, byte for byte, with what they were."""
    if request.param == "layerfs" and (reason := why_no_layerfs()):
        pytest.skip(reason)
    with ExitStack() as end:

        def make(*lowers: Path, content: bool = True) -> Mounted:
            stack = make_stack(n_lowers=0, name=request.param)
            if request.param == "plain":
                for lower in reversed(lowers):
                    run(["cp", "-a", f"{lower}/.", stack.mnt])
                return end.enter_context(PlainDir(stack))
            stack.lowers = list(lowers) or [stack._mkdir("lower0")]
            end.enter_context(lowers_guard(map(str, stack.lowers), content=content))
            return end.enter_context(Layerfs(stack))

        yield make


@pytest.fixture
def layer(make_stack: type[Stack]) -> Callable[[], Path]:
    """Makes empty directories to be filled and given to `place`."""

    def make() -> Path:
        return make_stack(n_lowers=1, name="layer", writable=False).lowers[0]

    return make
