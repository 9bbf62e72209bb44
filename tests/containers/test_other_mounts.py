"""What else podman and buildah mount through the mount program: images, overlay volumes, stores of others,
and layers unpacked under `force_mask`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.containers.conftest import MakeStore, base_tar
from tests.containers.store import Store, why_not
from tests.support.tree import lowers_guard

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
SRV = "big\nfirst\ngone\nold\nowned\nsecond\n"


def test_an_image_is_mounted(store: Store) -> None:
    """Read-only, on the host and as a volume; and with changes that go away with the container."""
    point = Path(store.podman("image", "mount", "base").strip())
    assert store.fuse_mounts() == [(str(point), "fuse.layerfs")]
    assert "".join(f"{name}\n" for name in sorted(os.listdir(point / "srv"))) == SRV
    with pytest.raises(OSError, match="Read-only file system"):
        (point / "new").touch()
    store.podman("image", "umount", "base")
    store.assert_idle()
    volume = "type=image,source=base,target=/img"
    assert store.podman("run", "--rm", "--mount", volume, "base", "ls", "/img/srv") == SRV
    work = "echo x >/img/srv/x; rm /img/srv/gone; ls /img/srv"
    said = store.podman("run", "--rm", "--mount", f"{volume},rw=true", "base", "sh", "-c", work)
    assert said == SRV.replace("gone\n", "") + "x\n"
    assert store.podman("run", "--rm", "--mount", volume, "base", "ls", "/img/srv") == SRV
    store.assert_idle()


def test_an_overlay_volume(store: Store) -> None:
    """`-v DIR:/x:O`: the directory is a lower layer, and stays as it is."""
    if reason := why_not("buildah"):
        pytest.skip(reason)
    host = store.dir / "host"
    (host / "sub/deep").mkdir(parents=True)
    (host / "a").write_text("a")
    work = "echo b >/h/b; echo c >>/h/a; cat /h/a; mv /h/sub /h/moved; rm /h/a; ls /h"
    with lowers_guard([host]):
        said = store.podman("run", "--rm", "-v", f"{host}:/h:O", "base", "sh", "-c", work)
        assert said == "ac\nb\nmoved\n"
        store.assert_idle()
        store.buildah("from", "--name", "work", "-v", f"{host}:/h:O", "base")
        said = store.buildah("run", "--isolation", "chroot", "work", "sh", "-c", work)
        assert said == "ac\nb\nmoved\n"
        store.buildah("rm", "work")
    store.assert_idle()


def test_images_of_another_store(store: Store, make_store: MakeStore) -> None:
    """`additionalimagestores`: the lower layers lie where nothing may be written."""
    other = make_store()
    layers = [str(path) for path in (store.dir / "root/overlay").glob("*/diff")]
    where = ["--storage-opt", f"overlay.imagestore={store.dir}/root"]
    with lowers_guard(layers):
        said = other.podman(*where, "run", "--rm", "base", "sh", "-c", "echo x >>/srv/first; cat /srv/second")
        assert said == "two namesx\n"
        other.assert_idle()
    assert not list((other.dir / "root/overlay").glob("*/diff"))


def test_force_mask(make_store: MakeStore, store: Store) -> None:
    """Storage keeps the owners in `user.containers.override_stat`; a container sees and changes them."""
    masked = make_store()
    where = ["--storage-opt", "overlay.force_mask=shared"]
    masked.podman(*where, "import", "-q", "-", "base", stdin=base_tar())
    (layer,) = (masked.dir / "root/overlay").glob("*/diff")
    owned = os.stat(layer / "srv/owned")
    assert (owned.st_uid, owned.st_mode & 0o7777) == (0, 0o755)
    work = """
        cd /srv; stat -c '%u:%g %a %n' *; chown 3:4 first; echo x >x; chmod 4711 x; mknod dev c 1 3
        stat -c '%u:%g %a %t:%T %n' first second x dev; cat owned
    """
    with lowers_guard([layer]):
        said = masked.podman(*where, "run", "--name", "one", "base", "sh", "-c", work)
        masked.assert_idle()
    plain = store.podman("run", "--rm", "base", "sh", "-c", work)
    assert said == plain
    assert "7:7 640 owned" in said and "3:4 644 0:0 second" in said and "0:0 4711 0:0 x" in said
    assert any("xattr_permissions=2" in call for call in masked.calls())
    assert "A /srv/x" in masked.podman(*where, "diff", "one").splitlines()
    masked.podman(*where, "rm", "-a", "-f")
