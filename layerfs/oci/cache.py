"""Layers of images as directories, unpacked once for each user and shared by all images that have them. Does
not mount, and removes nothing that is complete.

    $XDG_CACHE_HOME/layerfs/FORM/       a `store` for each kind of owner (`ownership`)
        layers/HEX    a layer directory (`unpack`), by DiffID. Depends on its tar alone
        chains/HEX    its `supplement` over the layers that it has below in some image, by ChainID
        roots/HEX     nothing but a root, by its attributes: for images whose top layers do not name the root

What a layer directory's record tells:

| field                                | meaning                                                             |
|--------------------------------------|---------------------------------------------------------------------|
| diff_id                              | of the tar that was unpacked, computed then                         |
| root_named                           | the layer says how the root looks                                   |
| opaque_root                          | it hides all layers below                                           |
| implied, links, whiteouts, opaque    | what it leans on (`unpack.Leaning`)                                 |

A layer is published after the size and the digest of its blob and its DiffID were found right
(`image.OpenLayer.verify`). A supplement's `empty` says that it need not be mounted.
"""

from __future__ import annotations

import hashlib
import os
import pwd
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerfs.errors import ImageError, LayerError, TarError
from layerfs.fdutil import OwnedFd, fd_path
from layerfs.ids import DiffId
from layerfs.oci.beneath import ROOT
from layerfs.oci.image import Image, ImageLayer
from layerfs.oci.making import ObjectMaker
from layerfs.oci.member import Kind, Member, display
from layerfs.oci.ownership import ownership_form
from layerfs.oci.progress import Progress, Silent
from layerfs.oci.store import Store
from layerfs.oci.supplement import describe, make_supplement
from layerfs.oci.tally import Tally
from layerfs.oci.unpack import Leaning, unpack_layer

_LAYERS, _CHAINS, _ROOTS = "layers", "chains", "roots"
#: A root that no layer says anything of.
_PLAIN_ROOT = Member(b"", Kind.DIR, 0o755)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer directory, and what its record says."""

    path: str
    root_named: bool
    opaque_root: bool
    leaning: Leaning


class LayerCache:
    """`notes`: what could not be unpacked as it should be, one line each; of layers that were unpacked by
    this object."""

    def __init__(self, path: str) -> None:
        """Raises LayerError when the directory `path` cannot be this user's cache."""
        self._base = Store(path).path
        self._store = Store(os.path.join(path, ownership_form()))
        self.notes: list[str] = []

    @classmethod
    def default(cls) -> LayerCache:
        """Raises LayerError."""
        return cls(default_path())

    def layer_directories(self, image: Image, progress: Progress | None = None) -> list[str]:
        """The directories that make up `image`, top first, to be mounted as lower layers; what is missing is
        unpacked. Never empty.

        Raises ImageError, TarError for a layer that is damaged, hostile or not what the image says,
        LayerError for what the file system refuses."""
        progress = progress or Silent()
        missing = [layer for layer in image.layers if self._store.find(_LAYERS, _hex(layer.diff_id)) is None]
        _tell_total(missing, progress)
        found = [
            self._layer(layer, number, len(image.layers), progress)
            for number, layer in enumerate(image.layers, 1)
        ]
        return self._stacked(image.layers, found, progress)

    def diff_id_of(self, path: str) -> DiffId | None:
        """The DiffID of the layer that the directory `path` was unpacked from; None for whatever is no layer
        directory of this cache, supplements and roots of its own included."""
        kind, key = os.path.split(os.path.dirname(os.path.realpath(path)))
        store, kind = os.path.split(kind)
        if (
            kind != _LAYERS
            or not os.path.isdir(path)
            or os.path.dirname(store) != os.path.realpath(self._base)
        ):
            return None
        try:
            made = Store(store).find(_LAYERS, key)
            return DiffId(str(made.record["diff_id"])) if made is not None else None
        except (LayerError, KeyError):
            return None

    # --- single layers ---

    def _layer(self, layer: ImageLayer, number: int, count: int, progress: Progress) -> _Layer:
        shown = f"layer {number} of {count}"

        def make(directory: int) -> dict[str, Any]:
            progress.describe(f"unpacking {shown}")
            try:
                with layer.open() as opened:
                    unpacked = unpack_layer(opened.source, directory, progress)
                    opened.verify()
            except TarError as error:
                raise TarError(f"{shown} ({layer.diff_id}): {error}", error.errno) from None
            except ImageError as error:
                raise ImageError(f"{shown}: {error}", error.errno) from None
            self.notes.extend(f"{shown}: {note}" for note in unpacked.notes)
            return {
                "diff_id": unpacked.diff_id,
                "root_named": unpacked.root_named,
                "opaque_root": unpacked.opaque_root,
                **_as_json(unpacked.leaning),
            }

        made = self._store.get(
            _LAYERS,
            _hex(layer.diff_id),
            make,
            lambda: progress.describe(f"waiting for another process that unpacks {shown}"),
        )
        record = made.record
        try:
            return _Layer(made.path, record["root_named"], record["opaque_root"], _leaning(record))
        except (KeyError, TypeError, ValueError):
            raise LayerError(f"{os.path.dirname(made.path)} in the cache is damaged: remove it") from None

    def _supplement(
        self, layer: ImageLayer, unpacked: _Layer, below: Sequence[str], root: Member | None
    ) -> str | None:
        """The directory to lie right above that of `layer` over `below`; None when there is no need of one.
        What `below` and `root` are follows from the ChainID."""

        def make(directory: int) -> dict[str, Any]:
            try:
                return {"empty": not make_supplement(directory, unpacked.path, unpacked.leaning, below, root)}
            except TarError as error:
                raise TarError(f"layer {layer.diff_id}: {error}", error.errno) from None

        if not unpacked.leaning:
            return None
        made = self._store.get(_CHAINS, _hex(layer.chain_id), make)
        return None if made.record.get("empty") else made.path

    def _root(self, root: Member) -> str:
        def make(directory: int) -> dict[str, Any]:
            ObjectMaker(Tally()).set_attributes(fd_path(directory), root, follow=True, clean=True)
            return {}

        attributes = (root.mode, root.uid, root.gid, root.mtime_ns, sorted(root.xattrs.items()))
        return self._store.get(_ROOTS, hashlib.sha256(repr(attributes).encode()).hexdigest(), make).path

    # --- all of them ---

    def _stacked(
        self, layers: Sequence[ImageLayer], found: Sequence[_Layer], progress: Progress
    ) -> list[str]:
        """Top first."""
        stack: list[str] = []
        #: as the layers so far say; None: none of them does
        root: Member | None = None
        shows_root = True
        for layer, unpacked in zip(layers, found, strict=True):
            if unpacked.opaque_root:
                stack = []
            if unpacked.root_named:
                root = _describe_root(unpacked.path)
            extra = self._supplement(layer, unpacked, stack, root)
            # The same layer again: nothing of the lower one is seen, and kernel overlayfs refuses it.
            stack = [unpacked.path, *(path for path in stack if path != unpacked.path)]
            if extra is not None:
                stack.insert(0, extra)
            shows_root = unpacked.root_named or extra is not None or root is None
        if not stack or (root is not None and not shows_root):
            stack.insert(0, self._root(root or _PLAIN_ROOT))
        return stack


def default_path() -> str:
    """$XDG_CACHE_HOME/layerfs, else ~/.cache/layerfs. With sudo that keeps HOME, `~` is root's all the same:
    his directories in somebody's cache would be in the way for ever."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # XDG Base Directory Specification: to be ignored
        home = os.environ.get("HOME", "")
        try:
            own = os.stat(home).st_uid == os.geteuid()
        except OSError:
            own = False
        if not own:
            try:
                home = pwd.getpwuid(os.geteuid()).pw_dir
            except KeyError:
                raise LayerError("there is no place for the cache: set XDG_CACHE_HOME") from None
        base = os.path.join(home, ".cache")
    else:
        _refuse_strangers(base)
    return os.path.join(base, "layerfs")


def _refuse_strangers(base: str) -> None:
    """Kept by `sudo -E` and `su`, $XDG_CACHE_HOME may be another user's, who could put anything in our way.
    Raises LayerError."""
    existing = base
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    try:
        owner = os.stat(existing).st_uid
    except OSError:
        return  # whoever opens it will say so
    if owner not in (0, os.geteuid()):
        raise LayerError(f"XDG_CACHE_HOME={display(os.fsencode(base))} belongs to user {owner}: unset it")


def _tell_total(missing: Sequence[ImageLayer], progress: Progress) -> None:
    descriptors = [layer.descriptor for layer in missing]
    progress.total(sum(each.size for each in descriptors if each) if all(descriptors) else None)


def _describe_root(path: str) -> Member:
    fd = OwnedFd(os.open(path, ROOT))
    return describe(b"", fd_path(fd.fd), follow=True)


def _hex(digest: str) -> str:
    """Names in the cache come from checked digests only."""
    algorithm, _, name = digest.partition(":")
    if algorithm != "sha256" or len(name) != 64 or not name.isalnum():
        raise ImageError(f"{digest[:100]!r} is no sha256 digest")
    return name


def _as_json(leaning: Leaning) -> dict[str, Any]:
    def text(value: Any) -> Any:
        return os.fsdecode(value) if isinstance(value, bytes) else [text(each) for each in value]

    return {name: text(value) for name, value in asdict(leaning).items()}


def _leaning(record: dict[str, Any]) -> Leaning:
    def names(field: str) -> tuple[bytes, ...]:
        return tuple(os.fsencode(name) for name in record[field])

    links = tuple((os.fsencode(name), os.fsencode(partner)) for name, partner in record["links"])
    return Leaning(names("implied"), links, names("whiteouts"), names("opaque"))
