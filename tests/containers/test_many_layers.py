"""An image of many layers: more than a page of option text, and whiteouts in storage's own form."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.containers.conftest import base_tar
from tests.containers.store import Store
from tests.support.tree import lowers_guard

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
LAYERS = 80


def small_layer(number: int) -> bytes:
    """Adds `/many/N`, removes `/many/N-3` for every third N, replaces `/many/dir` every tenth time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name: str, data: bytes | None) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.mode = (tarfile.DIRTYPE, 0o755) if data is None else (tarfile.REGTYPE, 0o644)
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))

        add("many", None)
        add(f"many/{number}", b"%d" % number)
        if number > 3 and number % 3 == 0:
            add(f"many/.wh.{number - 3}", b"")
        add("many/dir", None)
        if number % 10 == 0:
            add("many/dir/.wh..wh..opq", b"")
        add(f"many/dir/{number}", b"%d" % number)
    return out.getvalue()


def write_layout(where: Path, layers: list[bytes]) -> None:
    """An OCI layout with one image of these layers, tagged `t`."""
    blobs = where / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(kind: str, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {
            "mediaType": f"application/vnd.oci.image.{kind}",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {
            "type": "layers",
            "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers],
        },
    }
    manifest = {
        "schemaVersion": 2,
        "config": blob("config.v1+json", json.dumps(config).encode()),
        "layers": [blob("layer.v1.tar+gzip", gzip.compress(layer, 1, mtime=0)) for layer in layers],
    }
    entry = blob("manifest.v1+json", json.dumps(manifest).encode())
    entry["annotations"] = {"org.opencontainers.image.ref.name": "t"}
    (where / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (where / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def test_many_layers(store: Store) -> None:
    write_layout(store.dir / "tmp/layout", [base_tar(), *map(small_layer, range(1, LAYERS))])
    # An archive brings its own name; podman would make one of a layout's path, which may hold any signs.
    with tarfile.open(store.dir / "tmp/layout.tar", "w") as tar:
        tar.add(store.dir / "tmp/layout", ".")
    store.podman("load", "-q", "-i", store.dir / "tmp/layout.tar")
    image = "localhost/t"
    directories = [str(path) for path in (store.dir / "root/overlay").glob("*/diff")]
    assert len(directories) >= LAYERS
    last = LAYERS - 1
    kept = [n for n in range(1, LAYERS) if n % 3 or n + 3 >= LAYERS]
    with lowers_guard(directories):
        work = "cd /many; echo *; echo dir/*; mv dir moved; echo x >>moved/$0; rm 1; cat moved/$0; ls | wc -l"
        said = store.podman("run", "--name", "many", image, "sh", "-c", work, str(last)).splitlines()
        assert len(store.calls()[-1]) > 4096
        assert said[0].split() == sorted([*map(str, kept), "dir"])
        assert said[1].split() == sorted(f"dir/{n}" for n in range((LAYERS - 1) // 10 * 10, LAYERS))
        assert said[2:] == [f"{last}x", str(len(kept))]
        store.assert_idle()
    told = {line for line in store.podman("diff", "many").splitlines() if "/many" in line}
    assert {"C /many", "D /many/1", "D /many/dir", "A /many/moved"} <= told
    assert len(told) == 4 + len(said[1].split())
    store.podman("rm", "-a", "-f")
    store.assert_idle()
