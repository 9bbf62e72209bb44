"""Stacks in each other as an ordinary user makes them, in a user namespace: marks are `user.` attributes on
both levels, and the daemon of each is the namespace's root.
"""

from __future__ import annotations

import pytest

from tests.support.mounts import Layerfs
from tests.support.stack import Dir, File, Stack

SCRIPT = r"""
set -e
"$@" >/dev/null
cat outer/d/f; rm outer/gone
layerfs mount --lower outer --upper "$upper" --work "$work" inner
ls inner; echo changed >inner/d/f; rm inner/also; mv inner/d inner/e; ls inner inner/e
cat inner/e/f outer/d/f
layerfs umount inner
layerfs mount --lower outer --upper "$upper" --work "$work" inner
ls inner; cat inner/e/f
layerfs umount inner; layerfs umount outer
"""


@pytest.mark.parametrize("upper", ["tmpfs", "disk"])
def test_layerfs_on_layerfs(upper: str, make_stack: type[Stack], ordinary_user: tuple[int, int]) -> None:
    stack = make_stack(n_lowers=1, owner=ordinary_user, prefix="user.overlay.")
    tree = {"d": Dir(), "d/f": File(data=b"f\n"), "gone": File(), "also": File()}
    stack.write(stack.lowers[0], tree)
    for name in ("outer", "inner", "upper2", "work2", "tmpfs"):
        stack._mkdir(name)
    stack.mnt = stack.dir / "outer"
    m = Layerfs(stack, as_user=ordinary_user)
    where = stack.dir / "tmpfs" if upper == "tmpfs" else stack.dir
    prepare = "mount -t tmpfs none tmpfs && mkdir tmpfs/upper2 tmpfs/work2" if upper == "tmpfs" else "true"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"]
    command = [str(word) for word in m.command()]
    path = f"PATH={command[0].rpartition('/')[0]}:/usr/sbin:/usr/bin:/sbin:/bin"
    variables = [path, f"upper={where}/upper2", f"work={where}/work2"]
    shell = f"cd {stack.dir} && {prepare}\n{SCRIPT}"
    done = m.run("env", *variables, *unshare, "sh", "-c", shell, "sh", *command)
    assert (done.returncode, done.stderr) == (0, "")
    words = "f also d inner: e inner/e: f changed f e changed"
    assert " ".join(done.stdout.split()) == words
    assert m.wait_gone() and not m.new_complaints()
