"""The programs that are compared: how each packs a tree into a layer, or unpacks one. Times nothing."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from fsbench.commands import BenchmarkError, run

#: What GNU tar is told: everything that a layer holds, times to the nanosecond.
_TAR = "tar --format=posix --numeric-owner --xattrs"
_UNTAR = "tar --numeric-owner --xattrs -x"


class Tool:
    """One way to do one job. `shell` is what is timed, run by bash with pipefail."""

    name: str
    needs: tuple[str, ...] = ()
    #: keeps no fractions of seconds
    seconds = False

    def missing(self) -> str | None:
        """Why this one cannot be had here, or None."""
        lacking = [program for program in self.needs if not shutil.which(program)]
        return f"{', '.join(lacking)} not installed" if lacking else None

    def prepare(self, place: Path) -> None:
        """Whatever comes before the clock starts, once. `place` is an empty directory of its own."""

    def shell(self, out: Path) -> str:
        """`out` is an empty directory, anew for each run."""
        raise NotImplementedError

    def result(self, out: Path) -> Path:
        """What was made: the layer of a packer, the root of an unpacker."""
        raise NotImplementedError

    def end(self) -> None:
        """Takes away what removing files does not."""


class Pipeline(Tool):
    """GNU tar, alone or with a compressor behind it."""

    def __init__(self, tree: Path, compressor: str | None) -> None:
        self.name = f"tar | {compressor}" if compressor else "tar"
        self.needs = ("tar", compressor.split()[0]) if compressor else ("tar",)
        self._tree = tree
        self._compressor = compressor

    def shell(self, out: Path) -> str:
        tar = f"{_TAR} -C {shlex.quote(str(self._tree))} -c ."
        return f"{tar} {f'| {self._compressor} ' if self._compressor else ''}> {shlex.quote(str(out))}/layer"

    def result(self, out: Path) -> Path:
        return out / "layer"


class LayerfsCommit(Tool):
    """The tree as an upper over nothing; to a file by way of stdout, as the pipelines: nobody syncs it."""

    def __init__(self, command: str, tree: Path, compression: str, level: int | None = None) -> None:
        self.name = "layerfs commit" + (f" --level {level}" if level else "")
        self.needs = (command,)
        self._tree = tree
        self._options = f"--compression {compression}" + (f" --level {level}" if level else "")
        self._place = Path()

    def prepare(self, place: Path) -> None:
        self._place = place

    def shell(self, out: Path) -> str:
        command, tree, empty = (shlex.quote(str(word)) for word in (self.needs[0], self._tree, self._place))
        return (
            f"{command} commit --upper {tree} --lower {empty} {self._options} > {shlex.quote(str(out))}/layer"
        )

    def result(self, out: Path) -> Path:
        return out / "layer"


class UmociRepack(Tool):
    """The bundle's root file system was empty, and holds the tree now."""

    name = "umoci repack"
    needs = ("umoci",)
    seconds = True

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._place = Path()

    def prepare(self, place: Path) -> None:
        self._place = place
        layout, bundle = place / "layout", place / "bundle"
        run(["umoci", "init", "--layout", layout])
        run(["umoci", "new", "--image", f"{layout}:base"])
        run(["umoci", "unpack", "--image", f"{layout}:base", bundle])
        run(["cp", "-aT", "--reflink=auto", self._tree, bundle / "rootfs"], timeout=600)

    def shell(self, out: Path) -> str:
        base, layout = shlex.quote(str(self._place / "layout")), shlex.quote(str(out / "layout"))
        bundle = shlex.quote(str(self._place / "bundle"))
        return f"cp -r {base} {layout} && umoci repack --image {layout}:new {bundle}"

    def result(self, out: Path) -> Path:
        return _layer_of(out / "layout", "new")


class BuildahCommit(Tool):
    """A container from scratch that holds the tree, in a store of its own with the vfs driver."""

    needs = ("buildah",)
    seconds = True

    def __init__(self, tree: Path, compressed: bool) -> None:
        self.name = "buildah commit"
        self._tree = tree
        self._compressed = compressed
        self._base: list[str | Path] = []
        self._container = ""

    def prepare(self, place: Path) -> None:
        self._base = [
            "buildah",
            "--storage-driver",
            "vfs",
            "--root",
            place / "root",
            "--runroot",
            place / "run",
        ]
        self._container = run([*self._base, "from", "scratch"]).strip()
        root = run([*self._base, "mount", self._container]).strip()
        run(["cp", "-aT", "--reflink=auto", self._tree, root], timeout=600)

    def shell(self, out: Path) -> str:
        compression = f"--disable-compression={str(not self._compressed).lower()}"
        words = [*self._base, "commit", "-q", compression, self._container, f"oci:{out}/layout:new"]
        return shlex.join(str(word) for word in words)

    def result(self, out: Path) -> Path:
        return _layer_of(out / "layout", "new")

    def end(self) -> None:
        if self._container:
            run([*self._base, "rm", self._container], timeout=600)


def _layer_of(layout: Path, tag: str) -> Path:
    """The only layer of an image in an OCI layout."""

    def blob(descriptor: dict[str, str]) -> Path:
        return layout / "blobs" / descriptor["digest"].replace(":", "/")

    entries = json.loads((layout / "index.json").read_text())["manifests"]
    named = [one for one in entries if one["annotations"]["org.opencontainers.image.ref.name"] == tag]
    layers = json.loads(blob(named[0]).read_text())["layers"]
    if len(layers) != 1:
        raise BenchmarkError(f"{layout}: {len(layers)} layers in place of one")
    return blob(layers[0])


class Untar(Tool):
    def __init__(self, layer: Path, decompressor: str | None) -> None:
        self.name = f"{decompressor} | tar x" if decompressor else "tar x"
        self.needs = ("tar", decompressor.split()[0]) if decompressor else ("tar",)
        self._layer = layer
        self._decompressor = decompressor

    def shell(self, out: Path) -> str:
        layer, root = shlex.quote(str(self._layer)), shlex.quote(str(out))
        if self._decompressor is None:
            return f"{_UNTAR} -C {root} < {layer}"
        return f"{self._decompressor} < {layer} | {_UNTAR} -C {root}"

    def result(self, out: Path) -> Path:
        return out


class LayerfsApply(Tool):
    def __init__(self, command: str, layer: Path) -> None:
        self.name = "layerfs apply"
        self.needs = (command,)
        self._layer = layer

    def shell(self, out: Path) -> str:
        return shlex.join([self.needs[0], "apply", str(self._layer), str(out)])

    def result(self, out: Path) -> Path:
        return out


class UmociUnpack(Tool):
    name = "umoci unpack"
    needs = ("umoci",)

    def __init__(self, layer: Path) -> None:
        self._layer = layer
        self._place = Path()

    def prepare(self, place: Path) -> None:
        self._place = place
        layout = place / "layout"
        run(["umoci", "init", "--layout", layout])
        run(["umoci", "new", "--image", f"{layout}:new"])
        run(
            ["umoci", "raw", "add-layer", "--image", f"{layout}:new", _decompressed(self._layer, place)],
            timeout=600,
        )

    def shell(self, out: Path) -> str:
        return shlex.join(["umoci", "unpack", "--image", f"{self._place}/layout:new", f"{out}/bundle"])

    def result(self, out: Path) -> Path:
        return out / "bundle" / "rootfs"


def _decompressed(layer: Path, place: Path) -> Path:
    plain = place / "layer.tar"
    run(["bash", "-c", 'pigz -dc <"$0" >"$1"', layer, plain], timeout=600)
    return plain


def packers(command: str, tree: Path) -> dict[str, Sequence[Tool]]:
    """By compression; the first one is what the others are compared with."""
    return {
        "none": (Pipeline(tree, None), LayerfsCommit(command, tree, "none"), BuildahCommit(tree, False)),
        "gzip": (
            Pipeline(tree, "pigz"),
            LayerfsCommit(command, tree, "gzip"),
            LayerfsCommit(command, tree, "gzip", 6),
            UmociRepack(tree),
            BuildahCommit(tree, True),
        ),
        "zstd": (Pipeline(tree, "zstd -q -T0"), LayerfsCommit(command, tree, "zstd")),
    }


def unpackers(command: str, layers: dict[str, Path]) -> dict[str, Sequence[Tool]]:
    return {
        "none": (Untar(layers["none"], None), LayerfsApply(command, layers["none"])),
        "gzip": (
            Untar(layers["gzip"], "pigz -dc"),
            LayerfsApply(command, layers["gzip"]),
            UmociUnpack(layers["gzip"]),
        ),
        "zstd": (Untar(layers["zstd"], "zstd -q -dc"), LayerfsApply(command, layers["zstd"])),
    }
