"""Images for the tests, made by layerfs' own store, and the image tools of others."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from layerfs.oci.image import CONFIG, MANIFEST, Descriptor, digest_of
from layerfs.oci.layout import Layout
from tests.support.stack import scratch_root

needs_umoci = pytest.mark.skipif(not shutil.which("umoci"), reason="needs umoci")
needs_skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="needs skopeo")
needs_buildah = pytest.mark.skipif(not shutil.which("buildah"), reason="needs buildah")

PLAIN = "application/vnd.oci.image.layer.v1.tar"


@contextlib.contextmanager
def scratch_place(name: str) -> Iterator[Path]:
    """A directory that is gone afterwards. podman wants short paths, so: a short name; buildah takes no
    reference with `-_` in it, which mkdtemp may give."""
    path = scratch_root() / f"{name}-{secrets.token_hex(4)}"
    path.mkdir(0o700)
    try:
        yield path
    finally:
        subprocess.run(["rm", "-rf", path], check=True)


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A layer with these files, made by Python's own tarfile."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o755
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def entry(descriptor: Descriptor, **more: Any) -> dict[str, Any]:
    """A descriptor as JSON."""
    return {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
        **more,
    }


def config_of(layers: Sequence[bytes], **fields: Any) -> dict[str, Any]:
    """A config for uncompressed layers."""
    return {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        "history": [{"created_by": f"step {number}"} for number in range(len(layers))],
        **fields,
    }


def make_image(
    path: Path,
    tag: str = "t",
    layers: Sequence[bytes] = (),
    *,
    manifest: Mapping[str, Any] | None = None,
    **config: Any,
) -> Descriptor:
    """An image of uncompressed layers in the layout at `path`. `manifest` and `config` are put over the
    fields of the documents."""
    layout = Layout.create(str(path))
    blobs = [layout.put(layer, PLAIN) for layer in layers]
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": entry(layout.put_json(config_of(layers, **config), CONFIG)),
        "layers": [entry(blob) for blob in blobs],
        **(manifest or {}),
    }
    descriptor = layout.put_json(document, MANIFEST)
    layout.tag(tag, descriptor)
    return descriptor


class Tools:
    """buildah, skopeo and podman on stores of their own below `place`, accepting unsigned images."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._policy = place / "policy.json"
        self._policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        # podman takes no runroot of more than 50 characters.
        self._run = tempfile.TemporaryDirectory(prefix="lfs-", dir="/tmp", ignore_cleanup_errors=True)
        self._store = [
            "--storage-driver",
            "vfs",
            "--root",
            str(place / "storage"),
            "--runroot",
            self._run.name,
        ]

    def buildah(self, command: str, *arguments: str | Path) -> str:
        policy: list[str | Path] = (
            ["--signature-policy", self._policy] if command in ("from", "bud", "push", "commit") else []
        )
        return run("buildah", *self._store, command, *policy, *arguments)

    def podman(self, *arguments: str | Path) -> str:
        return run("podman", *self._store, *arguments)

    def skopeo_copy(self, source: str, target: str, *options: str) -> None:
        run("skopeo", "copy", "--quiet", "--policy", self._policy, *options, source, target)


def run(*command: str | Path) -> str:
    """stdout of a command that must succeed."""
    done = subprocess.run([os.fspath(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def blob(layout: Path, digest: str) -> Any:
    """A JSON blob, read without layerfs."""
    return json.loads((layout / "blobs" / digest.replace(":", "/")).read_bytes())


def manifest_of(layout: Path, tag: str) -> Any:
    """The manifest under `tag`, read without layerfs."""
    index = json.loads((layout / "index.json").read_bytes())
    (digest,) = [
        each["digest"]
        for each in index["manifests"]
        if each.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag
    ]
    return blob(layout, digest)
