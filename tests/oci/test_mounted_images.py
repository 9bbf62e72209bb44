"""Images that umoci, buildah and skopeo made, mounted, and compared with what umoci unpacks of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.oci.cache import LayerCache
from layerfs.oci.references import open_image
from tests.oci.images import Tools, needs_buildah, needs_skopeo, run, scratch_place
from tests.oci.test_interop import make_layers, make_layout, rich_tree
from tests.support import mounts
from tests.support.tree import Snapshot, assert_equal, snapshot

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, devices)"),
    pytest.mark.skipif(not shutil.which("umoci"), reason="needs umoci"),
    pytest.mark.skipif(bool(mounts.why_no_fuse()), reason="needs FUSE"),
]


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("img") as path:
        os.chmod(path, 0o755)
        (path / "m").mkdir()
        yield path


@contextlib.contextmanager
def mounted(place: Path, reference: str) -> Iterator[Path]:
    command = mounts.layerfs_command()
    env = os.environ | {"XDG_CACHE_HOME": str(place / "cache")}
    done = subprocess.run(
        [*command, "mount", reference, place / "m"], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    try:
        yield place / "m"
    finally:
        subprocess.run([*command, "umount", place / "m"], check=True)


@contextlib.contextmanager
def under_the_kernel(place: Path, layers: list[str]) -> Iterator[Path]:
    (place / "k").mkdir()
    if len(layers) == 1:  # it takes two
        (place / "k0").mkdir()
        layers = [*layers, str(place / "k0")]
    mounts.mount_overlay(place / "k", layers, None, None)
    try:
        yield place / "k"
    finally:
        mounts.umount(place / "k")


def unpacked_by_umoci(place: Path, layout: Path, tag: str) -> Snapshot:
    run("umoci", "raw", "unpack", "--image", f"{layout}:{tag}", place / f"by-umoci-{tag}")
    return snapshot(place / f"by-umoci-{tag}")


def compare(place: Path, layout: Path, tag: str, ignore: tuple[str, ...] = ()) -> Snapshot:
    expected = unpacked_by_umoci(place, layout, tag)
    with mounted(place, f"{layout}:{tag}") as point:
        found = snapshot(point)
    assert_equal(expected, found, ignore=ignore, labels=("umoci", "layerfs"))
    if not mounts.why_no_kernel_overlay():
        layers = LayerCache(f"{place}/cache/layerfs").layer_directories(open_image(f"{layout}:{tag}"))
        with under_the_kernel(place, layers) as point:
            seen = snapshot(point, hide_xattr=lambda name: name.startswith(b"trusted.overlay."))
        # The kernel counts names that a layer above hides.
        assert_equal(expected, seen, ignore=(*ignore, "nlink"), labels=("umoci", "kernel overlayfs"))
    return found


def test_our_own(place: Path) -> None:
    outs, summaries, tree = make_layers(place, "gzip")
    found = compare(place, make_layout(place, outs, summaries), "t")
    assert_equal(tree, found, labels=("applied", "mounted"))


def test_made_by_umoci(place: Path) -> None:
    """Three layers: a tree of everything, then files and directories removed, replaced and renamed."""
    layout, bundle = place / "layout", place / "bundle"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:t")
    run("umoci", "unpack", "--image", f"{layout}:t", bundle)
    root = bundle / "rootfs"
    shutil.rmtree(root)
    rich_tree(root)
    run("umoci", "repack", "--refresh-bundle", "--image", f"{layout}:t", bundle)
    (root / "dir/a").unlink()
    shutil.rmtree(root / "etc/empty")
    (root / "etc/empty").write_text("a file now")
    (root / "old").unlink()
    (root / "old").mkdir(mode=0o711)
    (root / "old/inside").write_text("1")
    (root / "dir/sub").rename(root / "moved")
    run("umoci", "repack", "--refresh-bundle", "--image", f"{layout}:t", bundle)
    (root / "moved").rename(root / "dir/sub")
    shutil.rmtree(root / "old")
    run("umoci", "repack", "--refresh-bundle", "--image", f"{layout}:t", bundle)
    assert len(open_image(f"{layout}:t").layers) == 3
    found = compare(place, layout, "t")
    assert b"dir/sub/hard" in found and not {b"dir/a", b"moved", b"old"} & found.keys()


@needs_skopeo
def test_docker_archive_by_skopeo(place: Path) -> None:
    outs, summaries, tree = make_layers(place, "none")
    layout = make_layout(place, outs, summaries)
    tools = Tools(place)
    tools.skopeo_copy(f"oci:{layout}:t", f"docker-archive:{place}/image.tar:x:t")
    for reference in (f"{place}/image.tar", f"{place}/image.tar:x:t"):
        with mounted(place, reference) as point:
            assert_equal(tree, snapshot(point), labels=("applied", "mounted"))
    tools.skopeo_copy(f"docker-archive:{place}/image.tar:x:t", f"oci:{place}/back:t")
    with mounted(place, f"{place}/back:t") as point:
        assert_equal(tree, snapshot(point), labels=("applied", "by way of skopeo"))
    # The same layers in three wrappings: unpacked once.
    layers = LayerCache(f"{place}/cache/layerfs").layer_directories(open_image(f"{place}/back:t"))
    assert len(layers) == len(list((place / "cache/layerfs/root/layers").iterdir())) == 2


@needs_skopeo
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_packed_by_skopeo(place: Path, compression: str) -> None:
    outs, summaries, tree = make_layers(place, "none")
    layout = make_layout(place, outs, summaries)
    packed = ("--dest-compress", "--dest-compress-format", compression)
    Tools(place).skopeo_copy(f"oci:{layout}:t", f"oci:{place}/packed:t", *packed)
    with mounted(place, f"{place}/packed:t") as point:
        assert_equal(tree, snapshot(point), labels=("applied", "mounted"))


@needs_buildah
@needs_skopeo
def test_made_by_buildah(place: Path) -> None:
    """Two layers, the second with what `RUN rm` and friends leave."""
    tools = Tools(place)
    base = place / "base"
    rich_tree(base)
    (base / "dir/sub" / ("ü" * 100)).unlink()
    container = tools.buildah("from", "scratch").strip()
    root = Path(tools.buildah("mount", container).strip())
    subprocess.run(["cp", "-a", f"{base}/.", root], check=True)
    tools.buildah("commit", "--quiet", container, "first")
    second = tools.buildah("from", "--pull-never", "localhost/first").strip()
    root = Path(tools.buildah("mount", second).strip())
    (root / "gone").unlink()
    shutil.rmtree(root / "etc/empty")
    (root / "etc/new").mkdir(mode=0o750)
    (root / "dir/a").write_text("changed")
    os.setxattr(root / "old", "user.k", b"v")
    layout = place / "layout"
    tools.buildah("commit", "--quiet", second, f"oci:{layout}:t")
    tools.buildah("rm", "--all")
    assert len(open_image(f"{layout}:t").layers) == 2
    found = compare(place, layout, "t")
    assert b"etc/new" in found and not {b"gone", b"etc/empty"} & found.keys()
