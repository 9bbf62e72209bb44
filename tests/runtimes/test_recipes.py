"""The recipes of README.md, section "A root for chroot, runc, crun, bubblewrap", run as they stand there.

`<!-- recipe: NAME -->` before a block: for root; NAME `anyone`: for an ordinary user too; NAME `user`: for
one alone. Each is run between the recipes `mount` and `umount`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.overlay.test_idmapped import why_not
from tests.support.mounts import mounts_below, umount, why_no_layerfs
from tests.support.stack import Stack

from .roots import root_tree
from .runtimes import find, hybrid_cgroups

README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(r"^<!-- recipe: ([\w-]+)(?: (\w+))? -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = {name: (who or "root", text) for name, who, text in _BLOCK.findall(README.read_text())}
AROUND = ("mount", "umount")
CASES = [
    (name, user)
    for name, (who, _) in RECIPES.items()
    for user in ("root", "user")
    if name not in AROUND and who in (user, "anyone")
]
#: What each must print, somewhere.
EXPECTED = {
    "chroot": "uid=0(root)",
    "pivot_root": "PID",
    "runc": "etc",
    "crun": "etc",
    "bwrap": "tried",
    "systemd-nspawn": "uid=0(root)",
    "systemd-nspawn-user": " 0        0 ",
    "runc-rootless": "uid=0(root)",
    "chroot-rootless": "uid=0(root)",
}


def test_every_recipe_is_tried() -> None:
    assert set(RECIPES) == {*EXPECTED, *AROUND}


def run(name: str, where: Path, owner: tuple[int, int] | None) -> str:
    text = RECIPES[name][1]
    if name == "crun" and hybrid_cgroups():
        text = "unshare --mount sh -c 'umount /sys/fs/cgroup/unified && exec \"$@\"' sh " + text
    if name.startswith("systemd-nspawn"):  # its directories in /run go with the namespace
        text = "unshare --mount sh -c 'mount -t tmpfs none /run && exec \"$@\"' sh " + text
    who = {"user": owner[0], "group": owner[1], "extra_groups": []} if owner else {}
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(where),
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        ["bash", "-ec", text],
        cwd=where,
        env=dict(os.environ) | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **who,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.mark.parametrize("name,user", CASES)
def test_recipe(name: str, user: str, make_stack: type[Stack], request: pytest.FixtureRequest) -> None:
    owner = None if user == "root" else request.getfixturevalue("ordinary_user")
    if reason := why_no_layerfs(owner[0] if owner else None):
        pytest.skip(reason)
    if find(re.sub("-(rootless|user)$", "", name)) is None:
        pytest.skip(f"not installed: {name}")
    stack = make_stack(n_lowers=0, name="recipe", owner=owner, writable=False)
    if name == "systemd-nspawn-user" and (reason := why_not(stack)):
        pytest.skip(reason)
    (stack.mnt / "base").mkdir()
    stack.write(stack.mnt / "base", root_tree(devices=owner is None))
    if owner:
        os.chown(stack.mnt / "base", *owner)
    try:
        run("mount", stack.mnt, owner)
        if name == "crun":
            run("runc", stack.mnt, owner)  # which writes the bundle
        assert EXPECTED[name] in run(name, stack.mnt, owner)
        run("umount", stack.mnt, owner)
        assert mounts_below(stack.mnt) == []
        if name == "bwrap":
            assert (stack.mnt / "upper" / "etc" / "tried").read_text() == "tried\n"
    finally:
        for point, _ in reversed(mounts_below(stack.mnt)):
            umount(point, 2)
