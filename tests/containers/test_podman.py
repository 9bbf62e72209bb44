"""podman on layerfs: what containers do, and that nothing is left of them. The oracle is fuse-overlayfs doing
the same, or what was put in."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.containers.conftest import MakeStore, base_tar
from tests.containers.store import Store, assert_same_layers, read_layer, why_not
from tests.support.processes import eventually
from tests.support.tree import lowers_guard

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

#: Changes of every kind that `diff` and `commit` must tell.
CHANGES = r"""
set -e
echo new >/srv/new; echo more >>/srv/second; rm /srv/gone
mv /srv/old /srv/renamed; mkdir /srv/old; echo fresh >/srv/old/file
chmod 600 /srv/big; chown 3:4 /srv/owned; ln /srv/new /srv/linked; ln -s new /srv/symbolic
rm -r /home; echo no directory >/home; mkfifo /srv/fifo; mkdir -m 1775 /srv/sticky
touch -d "2001-02-03 04:05:06" /etc/group
"""


def start(store: Store, name: str, *more: str, command: tuple[str, ...] = ("sleep", "1000")) -> None:
    store.podman("run", "-d", "--name", name, "--stop-timeout", "0", *more, "base", *command)


def merged(store: Store, name: str) -> Path:
    return Path(store.podman("inspect", "-f", "{{.GraphDriver.Data.MergedDir}}", name).strip())


def base_layers(store: Store) -> list[str]:
    """The directories of the images' layers."""
    return [str(path) for path in (store.dir / "root/overlay").glob("*/diff")]


def test_a_container_from_run_to_prune(store: Store, tmp_path: Path) -> None:
    with lowers_guard(base_layers(store)):
        start(store, "one")
        (point, kind), *more = store.fuse_mounts()
        assert (point, kind, more) == (str(merged(store, "one")), "fuse.layerfs", [])
        assert len(store.daemons()) == 1
        assert store.podman("exec", "one", "sh", "-c", "echo in >/srv/file; cat /srv/file") == "in\n"
        assert (Path(point) / "srv/file").read_text() == "in\n"
        # cp, both ways
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree/a").write_text("from outside")
        os.chmod(tmp_path / "tree/a", 0o640)
        store.podman("cp", tmp_path / "tree", "one:/srv/got")
        assert store.podman("exec", "one", "stat", "-c", "%a %s", "/srv/got/a") == "640 12\n"
        store.podman("cp", "one:/srv/old", tmp_path / "back")
        assert sorted(os.listdir(tmp_path / "back/deep")) == [str(n) for n in range(5)]
        store.podman("cp", "one:/srv/file", tmp_path / "file")
        assert (tmp_path / "file").read_text() == "in\n"
        # stop and start: what was written stays, and each time a daemon ends
        store.podman("stop", "-t", "0", "one")
        store.assert_idle()
        store.podman("start", "one")
        assert store.podman("exec", "one", "cat", "/srv/file") == "in\n"
        # export is the whole root
        store.podman("export", "-o", tmp_path / "root.tar", "one")
        with tarfile.open(tmp_path / "root.tar") as tar:
            names = set(tar.getnames())
            assert {"srv/file", "srv/got/a", "bin/busybox", "srv/gone"} <= names
            assert tar.extractfile("srv/file").read() == b"in\n"  # type: ignore[union-attr]
        store.podman("rm", "-a", "-f", "-t", "0")
        store.assert_idle()
    store.podman("system", "prune", "-a", "-f", "--volumes")
    assert store.podman("images", "-q") == ""
    store.assert_idle()
    assert os.listdir(store.dir / "root/overlay/l") == []
    assert base_layers(store) == []


def test_diff_and_commit_tell_the_same(make_store: MakeStore) -> None:
    """The same as without any overlay. fuse-overlayfs 1.10 is wrong about the names of a hard-linked file (it
    commits one with zeros at its end) and about times."""
    if reason := why_not("podman", "runc"):
        pytest.skip(reason)
    told, layers, read = {}, {}, {}
    for kind in ("layerfs", "vfs", "fuse-overlayfs"):
        made = make_store(kind)
        made.podman("import", "-q", "-", "base", stdin=base_tar())
        made.podman("run", "--name", "changed", "base", "sh", "-c", CHANGES)
        told[kind] = sorted(made.podman("diff", "changed").splitlines())
        made.podman("commit", "-q", "changed", "made")
        layers[kind] = made.layers("made", podman=True)
        read[kind] = made.podman("run", "--rm", "made", "cat", "/srv/second", "/home")
        made.assert_idle()  # podman (on vfs, too) trips over its own clean-up of a container that just ended
        made.podman("rm", "-a", "-f")
        made.assert_idle()
    assert "A /srv/renamed" in told["layerfs"]
    assert told["layerfs"] == told["vfs"]
    assert_same_layers(layers["layerfs"], layers["vfs"], "vfs")
    assert read["layerfs"] == read["vfs"] == "two namesmore\nno directory\n"
    # nor does it tell what a new directory hides of the old one; of the linked names now both, now one
    names = {"C /srv/first", "C /srv/second", "D /srv/old/deep"}
    assert {*told["layerfs"]} ^ {*told["fuse-overlayfs"]} <= names
    linked = ("srv/first", "srv/second", "srv/old/.wh.deep")
    assert_same_layers(
        layers["layerfs"], layers["fuse-overlayfs"], "fuse-overlayfs", but=linked, mtimes=False
    )


def test_a_container_that_changed_nothing_commits_an_empty_layer(store: Store) -> None:
    """containers/storage compares two mounts, walking both: attributes and xattrs must be the same."""
    store.podman("create", "--name", "still", "base", "true")
    assert store.podman("diff", "still") == ""
    store.podman("commit", "-q", "still", "same")
    first, added = store.layers("same", podman=True)
    assert "bin/busybox" in first
    assert added == {}
    # nor do metadata-only copies, redirects and recorded numbers in the layer below show as changes
    store.podman("run", "--name", "changed", "base", "sh", "-c", CHANGES)
    store.podman("commit", "-q", "changed", "made")
    store.podman("create", "--name", "still2", "made", "true")
    assert store.podman("diff", "still2") == ""
    store.assert_idle()
    store.podman("rm", "-a", "-f")
    store.assert_idle()


def test_what_was_read_is_not_a_change(store: Store) -> None:
    """Nor is what was touched to no effect: the copy-up of its attributes is not told."""
    store.podman(
        "run",
        "--name",
        "reader",
        "base",
        "sh",
        "-c",
        "cat /srv/* >/dev/null; ls -lR /bin; chmod 644 /srv/big",
    )
    told = store.podman("diff", "reader").splitlines()
    # podman itself makes the files that it mounts in /etc and /run
    assert [line for line in told if "/etc" not in line and "/run" not in line] == []
    store.assert_idle()
    store.podman("rm", "-a", "-f")


def test_eight_containers_of_one_image(store: Store) -> None:
    with lowers_guard(base_layers(store)), ThreadPoolExecutor(8) as pool:
        names = [f"c{number}" for number in range(8)]
        list(pool.map(lambda name: start(store, name), names))
        assert len(store.fuse_mounts()) == len(store.daemons()) == 8
        work = "echo $0 >>/srv/second; mv /srv/old /srv/$0; rm /srv/gone; echo $0 >/srv/first"
        list(pool.map(lambda name: store.podman("exec", name, "sh", "-c", work, name), names))
        for name in names:
            said = store.podman("exec", name, "sh", "-c", "cat /srv/second; cd /srv; echo *; ls c?/deep")
            listed = f"big {name} first owned second"
            assert said == f"{name}\n{listed}\n" + "".join(f"{n}\n" for n in range(5))
        store.podman("rm", "-a", "-f", "-t", "0")
        store.assert_idle()


def test_a_read_only_root(either: Store) -> None:
    done = either.try_podman(
        "run", "--rm", "--read-only", "base", "sh", "-c", "cat /srv/owned; echo x >/srv/x"
    )
    assert done.out == "7:8"
    assert "Read-only file system" in done.err and done.code == 1
    either.assert_idle()


def test_volumes(store: Store, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    work = "echo v >/srv/old/v; echo b >/mnt/b; ls /srv/old"
    store.podman("volume", "create", "vol")
    said = store.podman(
        "run", "--rm", "-v", "vol:/srv/old", "-v", f"{tmp_path}/in:/mnt", "base", "sh", "-c", work
    )
    assert said == "deep\nv\n"  # a new volume gets what the image has in its place
    assert (tmp_path / "in/b").read_text() == "b\n"
    assert store.podman("run", "--rm", "-v", "vol:/v:ro", "base", "cat", "/v/v") == "v\n"
    store.podman("system", "prune", "-a", "-f", "--volumes")
    store.assert_idle()


def test_a_killed_daemon_does_not_keep_its_container(store: Store) -> None:
    start(store, "victim")
    start(store, "other")
    (pid,) = [pid for pid in store.daemons() if _serves(pid, merged(store, "victim"))]
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: pid not in store.daemons())
    assert store.try_podman("exec", "victim", "cat", "/srv/first").code != 0
    store.podman("rm", "-f", "-t", "0", "victim")
    assert store.podman("ps", "-a", "--format", "{{.Names}}") == "other\n"
    assert len(store.fuse_mounts()) == len(store.daemons()) == 1
    assert store.podman("exec", "other", "cat", "/srv/first") == "two names"
    # and what the other one has written is there when it is started again
    store.podman("exec", "other", "sh", "-c", "echo kept >/srv/kept; mv /srv/old /srv/moved; sync")
    (pid,) = store.daemons()
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not store.daemons())
    store.podman("stop", "-t", "0", "other")
    store.podman("start", "other")
    assert store.podman("exec", "other", "sh", "-c", "cat /srv/kept; ls /srv/moved") == "kept\ndeep\n"
    store.podman("rm", "-a", "-f", "-t", "0")
    store.assert_idle()


def _serves(pid: int, point: Path) -> bool:
    return os.fsencode(point) in Path(f"/proc/{pid}/cmdline").read_bytes()


OWNERS = """
cd /srv; stat -c '%u:%g %n' / /bin/busybox owned first; cat owned
echo x >x; chown 5:6 x first; stat -c '%u:%g %n' x first; id -u
"""


@pytest.mark.parametrize(
    "how", [("--uidmap", "0:300000:2000", "--gidmap", "0:300000:2000"), ("--userns=auto",)]
)
def test_mapped_owners(store: Store, subordinate_ids: None, how: tuple[str, ...]) -> None:
    """Right owners in a user namespace, and no file of a layer is touched for it. In the image `owned` is
    of 7:7, all else of root."""
    with lowers_guard(base_layers(store)):
        said = store.podman("run", "--name", "mapped", *how, "base", "sh", "-c", OWNERS)
        assert said.splitlines() == [
            "0:0 /", "0:0 /bin/busybox", "7:7 owned", "0:0 first", "7:85:6 x", "5:6 first", "0",
        ]  # fmt: skip
        assert any("uidmapping=" in call for call in store.calls())
    told = set(store.podman("diff", "mapped").splitlines())
    assert {"A /srv/x", "C /srv/first"} <= told
    assert not {"C /srv/owned", "C /srv/big", "C /bin"} & told
    store.podman("commit", "-q", "mapped", "made")
    _, layer = store.layers("made", podman=True)
    assert (layer["srv/x"].uid, layer["srv/x"].gid) == (5, 6)
    assert (layer["srv/first"].uid, layer["srv/first"].gid) == (5, 6)
    store.assert_idle()
    store.podman("rm", "-a", "-f")
    store.assert_idle()


def test_an_image_of_other_owners_survives(store: Store) -> None:
    """save, load and run: layers packed out of a mount are the layers that were put in."""
    out = io.BytesIO(base_tar())
    before = store.layers("base", podman=True)
    store.podman("save", "-q", "-o", store.dir / "tmp/saved", "base")
    store.podman("rmi", "-a", "-f")
    store.podman("load", "-q", "-i", store.dir / "tmp/saved")
    assert_same_layers(before, store.layers("base", podman=True), "loaded")
    with tarfile.open(fileobj=out) as tar:
        assert {name.strip("/") for name in tar.getnames()} == before[0].keys()


def test_a_container_goes_back_to_fuse_overlayfs(store: Store) -> None:
    """As the README says: one whose changes were written without redirects and metadata-only copies."""
    store.mountopt = "redirect_dir=off,metacopy=off"
    store.podman("run", "--name", "plain", "base", "sh", "-c", CHANGES)
    assert all("redirect_dir=off,metacopy=off" in call for call in store.calls() if "upperdir=" in call)
    store.assert_idle()
    roots = {}
    for kind in ("layerfs", "fuse-overlayfs"):
        store.kind, store.mountopt = kind, ""
        store.podman("export", "-o", store.dir / "tmp/root.tar", "plain")
        roots[kind] = read_layer(store.dir / "tmp/root.tar")
        (store.dir / "tmp/root.tar").unlink()
        store.assert_idle()
    assert {"srv/renamed/deep/4", "srv/old/file", "srv/linked"} <= roots["layerfs"].keys()
    assert_same_layers([roots["layerfs"]], [roots["fuse-overlayfs"]], "fuse-overlayfs")
    store.podman("rm", "-a", "-f")
