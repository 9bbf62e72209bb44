"""The README's section on podman and buildah: its storage.conf in the place that it names, its commands as
they stand there, and the machine's own files out of reach."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.conftest import MakeStore, base_tar
from tests.containers.store import Store, why_not
from tests.real.test_readme import matches
from tests.support import mounts
from tests.support.processes import eventually
from tests.support.stack import Stack

pytestmark = [pytest.mark.root, pytest.mark.timeout(300), pytest.mark.usefixtures("subordinate_ids")]

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("## As podman's, buildah's and CRI-O's storage")[2].partition("\n## ")[0]
CONF = re.search(r"^```toml\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
BIN = "/usr/local/bin"


def commands(who: str) -> list[tuple[str, str]]:
    """(command, expected output) of the blocks marked for `who`."""
    sign = "#" if who == "podman" else r"\$"
    found = []
    for block in re.findall(
        rf"^<!-- {who} -->\n```shell-session\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL
    ):
        for part in re.split(rf"^{sign} ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            found.append((command, expected))
    assert len(found) >= 3
    return found


@pytest.fixture
def installed(make_store: MakeStore, make_stack: type[Stack], machine_out_of_reach: None) -> Iterator[Store]:
    """mount.layerfs in /usr/local/bin, in this mount namespace alone, and a directory `base` with a root."""
    if reason := why_not("podman", "buildah", "runc", "newuidmap") or mounts.why_no_kernel_overlay():
        pytest.skip(reason)
    for needed in ("/var/lib/containers", "/run/containers", "/etc/containers"):
        if ("tmpfs", needed) not in [(kind, point) for point, kind in mounts.mounts_below(needed)]:
            pytest.skip(f"{needed} cannot be covered")
    store = make_store("layerfs")
    cover = make_stack(n_lowers=1)
    assert cover.upper is not None
    (cover.upper / "mount.layerfs").write_bytes((store.dir / "mount.layerfs").read_bytes())
    (cover.upper / "mount.layerfs").chmod(0o755)
    mounts.mount_overlay(BIN, [BIN], cover.upper, cover.work)
    try:
        yield store
    finally:
        mounts.umount(BIN, mounts.MNT_DETACH)


def run_all(store: Store, listed: list[tuple[str, str]]) -> None:
    for command, expected in listed:
        # stderr apart: rootless podman warns of a "/" that is not shared, as in the tests' mount namespace
        done = store.run("bash", "-c", command)
        assert matches(expected, done.out), (
            f"$ {command}\nexpected:\n{expected}\ngot ({done.code}):\n{done.out}{done.err}"
        )


def unpack(store: Store) -> None:
    (store.dir / "base.tar").write_bytes(base_tar())
    store.ok("sh", "-ec", "mkdir base; tar -x --no-same-owner -f base.tar -C base")


def test_as_root(installed: Store) -> None:
    assert CONF is not None
    Path("/etc/containers/storage.conf").write_text(CONF[1])
    del installed.env["CONTAINERS_STORAGE_CONF"]
    unpack(installed)
    try:
        run_all(installed, commands("podman"))
        installed.ok("podman", "rm", "-a", "-f", "-t", "0")
        installed.assert_idle()
        assert eventually(
            lambda: not [m for m in mounts.mounts_below("/var/lib/containers") if "fuse" in m[1]]
        )
    finally:
        os.unlink("/etc/containers/storage.conf")


def test_rootless(installed: Store, make_store: MakeStore, ordinary_user: tuple[int, int]) -> None:
    assert CONF is not None
    store = make_store("layerfs", ordinary_user[0])
    if (
        store.try_podman("info").code != 0
        and make_store("fuse-overlayfs", ordinary_user[0]).try_podman("info").code
    ):
        pytest.skip("podman does not start rootless here, on fuse-overlayfs either")
    store.podman("system", "migrate")
    del store.env["CONTAINERS_STORAGE_CONF"]
    store.env["HOME"] = str(store.dir / "home")
    words = re.sub(r"^(graphroot|runroot) = .*\n", "", CONF[1], flags=re.MULTILINE)
    where = store.dir / "home/.config/containers"
    store.ok("mkdir", "-p", where)
    (where / "storage.conf").write_text(words)
    unpack(store)
    log = installed.dir / "log"  # the installed command is the other store's
    log.chmod(0o777)
    (log / "calls").unlink(missing_ok=True)
    installed.dir.chmod(0o755)
    try:
        run_all(store, commands("rootless"))
        store.ok("podman", "rm", "-a", "-f")
    finally:
        store.run("podman", "system", "migrate")
    store.assert_idle()
