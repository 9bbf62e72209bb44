"""Every console block of README.md is run as it stands there, in order, and must print what the README says.

A line `$ COMMAND` is run by one bash from the first block to the last; what follows is its output, both
streams. `…` in it stands for any text, a line with nothing else for any lines. Blocks after `<!-- root -->`
are for root."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import mounts_below, umount, why_no_layerfs
from tests.support.stack import Stack

pytestmark = [pytest.mark.long, pytest.mark.root, pytest.mark.timeout(300)]

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^(<!-- root -->\n+)?```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "@@@done@@@"


def commands(*, root: bool) -> Iterator[tuple[str, str]]:
    """(command, expected output) of every block that this user may run."""
    found = 0
    for only_root, block in BLOCK.findall(README.read_text()):
        if only_root and not root:
            continue
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            found += 1
            yield command, expected
    assert found >= 10, "README.md has lost its commands, or this test its way of finding them"


def matches(expected: str, got: str) -> bool:
    """Line by line, as glob does with `*`: `…` alone takes as few lines as it can."""
    lines = [
        r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + r"\n"
        for line in expected.splitlines()
    ]
    return re.fullmatch("".join(lines), got.rstrip("\n") + "\n" if got.strip() else "") is not None


@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_readme(user: str, make_stack: type[Stack], request: pytest.FixtureRequest) -> None:
    owner = None if user == "root" else request.getfixturevalue("ordinary_user")
    if reason := why_no_layerfs(owner[0] if owner else None):
        pytest.skip(reason)
    where = make_stack(n_lowers=1, name="readme", owner=owner, writable=False).lowers[0]
    listed = list(commands(root=owner is None))
    script = "".join(f"{command}\nprintf '\\n{MARK}%d\\n' $?\n" for command, _ in listed)
    environment = dict(os.environ) | {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(where),
        "LC_ALL": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(
            ["bash", "-c", f"exec 2>&1 </dev/null\n{script}"],
            cwd=where,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            **({"user": owner[0], "group": owner[1], "extra_groups": []} if owner else {}),  # type: ignore[call-overload]
        )
    finally:
        for point, _ in reversed(mounts_below(where)):
            umount(point, 2)
    answers = re.split(rf"\n{MARK}\d+\n", done.stdout)
    wrong = [
        f"$ {command}\nexpected:\n{expected}\ngot:\n{got}"
        for (command, expected), got in zip(listed, answers, strict=False)
        if not matches(expected, got)
    ]
    assert len(answers) == len(listed) + 1, done.stdout
    assert not wrong, "\n\n".join(wrong)
