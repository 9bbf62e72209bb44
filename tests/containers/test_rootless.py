"""The same as an ordinary user, with subordinate ids that are given to him in this mount namespace alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.containers.conftest import MakeStore, base_tar
from tests.containers.store import Layer, Store, assert_same_layers, why_not
from tests.containers.test_buildah import SHORT
from tests.containers.test_podman import CHANGES
from tests.support import mounts
from tests.support.processes import eventually
from tests.support.stack import Stack
from tests.support.tree import snapshot

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("subordinate_ids", "ordinary_user"),
]
USER = 65534


def leave(store: Store) -> None:
    """Ends the process that keeps the namespaces of a rootless podman."""
    store.podman("system", "migrate")
    store.assert_idle()


def test_an_image_built_rootless(make_store: MakeStore, context: Path) -> None:
    if reason := why_not("buildah", "newuidmap"):
        pytest.skip(reason)
    (context / "Dockerfile").write_text(SHORT)
    context.chmod(0o755)
    built: dict[str, list[Layer]] = {}
    for kind in ("layerfs", "vfs"):
        store = make_store(kind, USER)
        store.build(context, "made")
        built[kind] = store.layers("made")
        # a container of the image, with its own root and owners
        store.buildah("from", "--name", "again", "localhost/made")
        told = store.buildah(
            "run", "--isolation", "chroot", "again", "sh", "-c", "stat -c %u:%g:%a /work/note /srv"
        )
        assert told == "7:8:664\n0:0:755\n"
        store.buildah("rm", "-a")
        store.buildah("rmi", "-a", "-f")
        store.assert_idle()
    assert_same_layers(built["layerfs"], built["vfs"], "vfs")


def test_podman_rootless(make_store: MakeStore) -> None:
    if reason := why_not("podman", "runc", "newuidmap"):
        pytest.skip(reason)
    control = make_store("fuse-overlayfs", USER)
    before = _first_container(control)
    leave_if_it_ran(control)
    store = make_store("layerfs", USER)
    after = _first_container(store)
    assert after == before
    if before != (0, "0:0\n"):
        leave_if_it_ran(store)
        pytest.skip(f"podman runs no rootless container here, on fuse-overlayfs either: {before}")
    # owners by `uidmapping=`: rootless there are no idmapped mounts for storage to use
    told = "id -u; stat -c '%u:%g %n' /srv/owned /srv/big; touch /tmp/x; stat -c '%u:%g' /tmp/x"
    for how in (["--uidmap", "0:1:1000", "--gidmap", "0:1:1000"], ["--userns", "keep-id", "--user", "root"]):
        said = store.podman(
            "run", "--rm", *how, "base", "sh", "-c", f"{told}; chown 3:4 /tmp/x; stat -c '%u:%g' /tmp/x"
        )
        assert said == "0\n7:7 /srv/owned\n0:0 /srv/big\n0:0\n3:4\n"
        assert "uidmapping=" in store.calls()[-1]
    store.podman("run", "-d", "--name", "one", "base", "sleep", "1000")
    store.podman("run", "-d", "--name", "two", "base", "sleep", "1000")
    assert len(store.daemons()) == 2
    assert (
        store.podman("exec", "one", "sh", "-c", "echo x >/srv/x; chown 5:6 /srv/x; cat /srv/*st")
        == "two names"
    )
    assert store.podman("exec", "two", "sh", "-c", "ls /srv") == "big\nfirst\ngone\nold\nowned\nsecond\n"
    store.podman("stop", "-t", "0", "one")
    assert store.podman("run", "--rm", "--read-only", "base", "stat", "-c", "%u:%g", "/srv/owned") == "7:7\n"
    store.podman("commit", "-q", "one", "made")
    assert store.podman("run", "--rm", "made", "stat", "-c", "%u:%g", "/srv/x") == "5:6\n"
    assert "A /srv/x" in store.podman("diff", "one").splitlines()
    store.podman("rm", "-a", "-f", "-t", "0")
    assert eventually(lambda: not store.daemons())
    store.podman("system", "prune", "-a", "-f")
    leave(store)


def _first_container(store: Store) -> tuple[int, str]:
    """What becomes of the first container: exit status, and what it said."""
    done = store.try_podman("import", "-q", "-", "base", stdin=base_tar())
    if done.code == 0:
        done = store.try_podman("run", "--rm", "base", "stat", "-c", "%u:%g", "/srv/big")
    return done.code, done.out


def leave_if_it_ran(store: Store) -> None:
    store.try_podman("system", "migrate")
    store.assert_idle()


@pytest.mark.parametrize("by", ["buildah unshare", "unshare"])
def test_in_a_user_namespace(make_store: MakeStore, make_stack: type[Stack], by: str) -> None:
    """A mount made by hand inside the namespace: owners, devices' place holders, whiteouts, renames; the
    upper is then read by another namespace, and by root."""
    if reason := why_not("buildah", "newuidmap"):
        pytest.skip(reason)
    store = make_store("layerfs", USER)
    stack = make_stack(n_lowers=1, owner=(USER, USER))
    base = store.dir / "base.tar"
    base.write_bytes(base_tar())
    words = ["unshare", "-Urm", "--map-auto"] if by == "unshare" else ["buildah", *store.where, "unshare"]
    layers = f"lowerdir={stack.lowers[0]},upperdir={stack.upper},workdir={stack.work}"
    helper = store.dir / "mount.layerfs"
    mount = f"{helper} -o {layers} {stack.mnt}"
    umount = f"fusermount3 -u {stack.mnt}"
    look = f"cd {stack.mnt} && find . | sort && cd srv && stat -c '%u:%g %a %s %n' * && cd / "
    store.ok(*words, "sh", "-ec", f"tar -xpf {base} -C {stack.lowers[0]}")
    work = CHANGES.replace("/srv", "srv").replace("/home", "home").replace("/etc", "etc")
    # The namespace's own processes end with it: the daemon must have ended before.
    first = store.ok(*words, "sh", "-ec", f"{mount}; cd {stack.mnt}; {work} cd /; {look}; {umount}")
    assert "3:4 640 3 owned" in first.splitlines()
    assert "./srv/renamed/deep/4" in first.splitlines() and "./srv/gone" not in first.splitlines()
    assert eventually(lambda: not store.daemons())
    assert store.ok(*words, "sh", "-ec", f"{mount}; {look}; {umount}") == first
    assert eventually(lambda: not store.daemons())
    # The rootful side reads it, with the ids as the disk has them.
    with mounts.Layerfs(stack, "userxattr") as mounted:
        seen = snapshot(mounted.mnt)
        names = {os.fsdecode(name) for name in seen if name != b"."}
        assert names == {line[2:] for line in first.splitlines() if line.startswith("./")}
        assert seen[b"srv/big"].mode == 0o600 and seen[b"srv/big"].uid == USER
        assert (seen[b"srv/owned"].uid, seen[b"srv/owned"].gid) == (600_002, 600_003)
    store.assert_idle()
