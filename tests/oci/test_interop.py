"""Layers against the tools that people have: GNU tar, umoci and skopeo accept what commit makes, and unpack
the same tree."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.oci.commit import CommitOptions, Summary, output_file, write_layer
from layerfs.overlay.names import TRUSTED, XattrNames
from layerfs.stack import Stack
from tests.oci.images import needs_skopeo, needs_umoci
from tests.oci.test_commit import apply
from tests.support.stack import scratch_root
from tests.support.tree import Snapshot, assert_equal, snapshot

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, devices)")

_ACL = bytes.fromhex(
    "02000000 01000600ffffffff 0200040039300000 04000400ffffffff 10000400ffffffff 20000400ffffffff".replace(
        " ", ""
    )
)
_DEFAULT = bytes.fromhex("02000000 01000700ffffffff 04000500ffffffff 20000500ffffffff".replace(" ", ""))
_CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
_T = 1_500_000_000_123_456_789


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="interop-", dir=scratch_root()))
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


def rich_tree(root: Path) -> None:
    """Something of everything that a layer can carry."""
    path = os.fsencode(root)
    os.makedirs(path + b"/etc/empty")
    os.makedirs(path + b"/dir/sub")
    files = {
        b"etc/passwd": b"root\n",
        b"dir/a": b"1" * 5000,
        b"dir/" + b"l" * 200: b"long",
        b"dir/sub/" + "ü".encode() * 100: b"utf8",
        b"dir/\xff\xfe raw": b"raw",
        b"dir/new\nline": b"nl",
        b"capable": b"x",
        b"sparse": b"",
        b"old": b"old",
        b"gone": b"gone",
    }
    for name, data in files.items():
        with open(path + b"/" + name, "wb") as file:
            file.write(data)
    os.truncate(path + b"/sparse", 1 << 20)
    os.link(path + b"/dir/a", path + b"/dir/sub/hard")
    os.symlink(b"../etc/passwd", path + b"/dir/link")
    os.symlink(b"t" * 180, path + b"/dir/longlink")
    os.mkfifo(path + b"/fifo")
    os.mknod(path + b"/null", 0o20666, os.makedev(1, 3))
    os.mknod(path + b"/loop", 0o60660, os.makedev(7, 0))
    os.chown(path + b"/dir/a", 1000, 1001)
    os.chown(path + b"/dir/link", 7, 8, follow_symlinks=False)
    os.chown(path + b"/etc/passwd", 3_000_000, 4_000_000)
    os.chmod(path + b"/old", 0o4711)
    os.chmod(path + b"/dir/sub", 0o3775)
    os.setxattr(path + b"/dir/a", b"user.k", b"bin\0\xff\n=")
    os.setxattr(path + b"/etc/passwd", b"system.posix_acl_access", _ACL)
    os.setxattr(path + b"/etc/empty", b"system.posix_acl_default", _DEFAULT)
    os.setxattr(path + b"/capable", b"security.capability", _CAPABILITY)
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            os.utime(directory + b"/" + name, ns=(0, _T), follow_symlinks=False)
        os.utime(directory, ns=(0, _T - 1))


def make_layers(place: Path, compression: str) -> tuple[list[Path], list[Summary], Snapshot]:
    """Two layers, one upon the other, and the tree that they make."""
    empty, base, upper, merged = (place / name for name in ("empty", "base", "upper", "merged"))
    empty.mkdir()
    rich_tree(base)
    (upper / "dir/sub").mkdir(parents=True)
    (upper / "etc/new").mkdir(parents=True)
    os.setxattr(upper / "dir/sub", "trusted.overlay.opaque", b"y")
    (upper / "dir/sub/fresh").write_text("f")
    os.mknod(upper / "gone", 0o20000, 0)
    (upper / "old").symlink_to("etc")
    (upper / ".wh.fifo").write_text("")
    os.setxattr(upper, "trusted.overlay.impure", b"y")
    for path in ("dir/sub", "etc/new", "dir", "etc", "."):
        os.utime(upper / path, ns=(0, _T + 5))
    outs, summaries = [], []
    for number, (low, high) in enumerate(((empty, base), (base, upper))):
        out = place / f"layer{number}"
        with output_file(str(out)) as fd:
            summaries.append(
                write_layer(Stack([str(low)], str(high), XattrNames(TRUSTED)), fd, CommitOptions(compression))
            )
        outs.append(out)
    merged.mkdir()
    for out in outs:
        apply(out, merged)
    tree = snapshot(merged)
    assert {b"dir/sub/fresh", b"etc/new", b"old"} <= tree.keys()
    assert not {b"gone", b"fifo", b"dir/sub/hard"} & tree.keys()
    return outs, summaries, tree


def make_layout(place: Path, outs: list[Path], summaries: list[Summary]) -> Path:
    """An OCI image layout around the layers (image-spec image-layout.md)."""
    layout = place / "layout"
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [summary.written.diff_id for summary in summaries]},
        "history": [{"created_by": "layerfs"} for _ in summaries],
    }
    descriptors = []
    for out, summary in zip(outs, summaries, strict=True):
        told = blob(out.read_bytes())
        assert told == {"digest": summary.written.digest, "size": summary.written.size}
        descriptors.append({"mediaType": summary.written.media_type, **told})
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            **blob(json.dumps(config).encode()),
        },
        "layers": descriptors,
    }
    index = {
        "schemaVersion": 2,
        "manifests": [
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                **blob(json.dumps(manifest).encode()),
                "annotations": {"org.opencontainers.image.ref.name": "t"},
            }
        ],
    }
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return layout


def run(*command: str | Path) -> str:
    done = subprocess.run([os.fspath(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@needs_umoci
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_umoci_unpacks_the_same_tree(place: Path, compression: str) -> None:
    outs, summaries, tree = make_layers(place, compression)
    layout = make_layout(place, outs, summaries)
    run("umoci", "raw", "unpack", "--image", f"{layout}:t", place / "rootfs")
    assert_equal(tree, snapshot(place / "rootfs"), labels=("layerfs", "umoci"))


@needs_skopeo
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_skopeo_copies_to_a_docker_archive_and_back(place: Path, compression: str) -> None:
    outs, summaries, tree = make_layers(place, compression)
    layout = make_layout(place, outs, summaries)
    archive = place / "image.tar"
    policy = place / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    copy = ("skopeo", "copy", "--quiet", "--policy", policy)
    run(*copy, f"oci:{layout}:t", f"docker-archive:{archive}:x:t")
    run(*copy, f"docker-archive:{archive}:x:t", f"oci:{place}/back:t")
    # docker save style: each layer is there uncompressed, under its DiffID's bytes
    found = []
    with tarfile.open(archive) as tar:
        manifest = json.loads(tar.extractfile("manifest.json").read())  # type: ignore[union-attr]
        for name in manifest[0]["Layers"]:
            member = tar.extractfile(tar.getmember(name).linkname if tar.getmember(name).issym() else name)
            assert member is not None
            found.append("sha256:" + hashlib.sha256(member.read()).hexdigest())
    assert found == [summary.written.diff_id for summary in summaries]
    # and what skopeo packed again (gzip, by its own code) is read here
    back = place / "back"
    target = place / "target"
    target.mkdir()
    index = json.loads((back / "index.json").read_text())
    blobs = back / "blobs/sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].split(":")[1]).read_text())
    for layer in manifest["layers"]:
        apply(blobs / layer["digest"].split(":")[1], target)
    assert_equal(tree, snapshot(target), labels=("layerfs", "by way of skopeo"))


@needs_umoci
def test_umocis_own_layers_are_applied(place: Path) -> None:
    """umoci packs a root that it unpacked and that was changed: applied here, it is that root."""
    outs, summaries, _ = make_layers(place, "gzip")
    layout = make_layout(place, outs, summaries)
    run("umoci", "unpack", "--image", f"{layout}:t", place / "bundle")
    root = place / "bundle/rootfs"
    (root / "dir/a").unlink()
    shutil.rmtree(root / "etc/empty")
    (root / "etc/added").write_text("by umoci")
    os.setxattr(root / "etc/added", "user.u", b"\0u")
    run("umoci", "repack", "--image", f"{layout}:t2", place / "bundle")
    index = json.loads((layout / "index.json").read_text())
    (digest,) = [
        entry["digest"]
        for entry in index["manifests"]
        if entry["annotations"]["org.opencontainers.image.ref.name"] == "t2"
    ]
    manifest = json.loads((layout / "blobs/sha256" / digest.split(":")[1]).read_text())
    target = place / "target"
    target.mkdir()
    for layer in manifest["layers"]:
        apply(layout / "blobs/sha256" / layer["digest"].split(":")[1], target)
    # umoci 0.4.7 rounds times to seconds
    assert_equal(snapshot(root), snapshot(target), ignore=("mtime_ns",), labels=("umoci", "layerfs"))


def test_gnu_tar_extracts_the_same_tree(place: Path) -> None:
    empty = place / "empty"
    empty.mkdir()
    rich_tree(place / "base")
    out = place / "layer.tar"
    with output_file(str(out)) as fd:
        write_layer(Stack([str(empty)], str(place / "base"), XattrNames(TRUSTED)), fd)
    target = place / "target"
    target.mkdir()
    said = run("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", out, "-C", target)
    assert said == ""
    assert_equal(snapshot(place / "base"), snapshot(target), labels=("tree", "GNU tar"))


@pytest.mark.parametrize("form", ["pax", "gnu", "ustar", "v7"])
def test_gnu_tars_own_archives_are_applied(place: Path, form: str) -> None:
    base = place / "base"
    rich_tree(base)
    if form in ("ustar", "v7"):  # they have no room for these
        for name in (b"dir/" + b"l" * 200, b"dir/sub/" + "ü".encode() * 100, b"dir/longlink", b"etc/passwd"):
            os.unlink(os.fsencode(base) + b"/" + name)
    if form == "v7":
        for name in ("fifo", "null", "loop"):
            os.unlink(base / name)
    extra = ["--xattrs", "--xattrs-include=*"] if form == "pax" else []
    archive = place / "a.tar"
    run("tar", f"--format={form}", "--numeric-owner", *extra, "-cf", archive, "-C", base, ".")
    target = place / "target"
    target.mkdir()
    apply(archive, target)
    ignore = () if form == "pax" else ("xattrs", "mtime_ns")
    assert_equal(snapshot(base), snapshot(target), ignore=ignore, labels=("tree", "applied"))
