"""The options of `layerfs commit` that make an image, and the way from them to `layerfs.oci.append`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from layerfs.cli import talk
from layerfs.control.reading import Reading, nearest_directory
from layerfs.errors import UsageError
from layerfs.fdutil import OwnedFd
from layerfs.ids import DiffId
from layerfs.oci.commit import CommitOptions, Summary, is_inside, write_layer
from layerfs.oci.member import display
from layerfs.oci.progress import Progress
from layerfs.oci.streams import Written
from layerfs.stack import Stack

if TYPE_CHECKING:
    from layerfs.oci.append import Appended, ImageOptions
    from layerfs.oci.image import Image


@dataclass(frozen=True, slots=True)
class Target:
    """Where an image goes, what it is made of, and what it says of itself."""

    path: str
    tag: str
    base: Image | None
    options: ImageOptions

    def __str__(self) -> str:
        return f"{display(os.fsencode(self.path))}:{self.tag}"


message_option = click.option("-m", "--message", metavar="TEXT", help="For the image's history.")
author_option = click.option(
    "-a", "--author", metavar="TEXT", default="", help="For the image and its history."
)
change_option = click.option(
    "-c",
    "--change",
    "changes",
    multiple=True,
    metavar="INSTRUCTION",
    help="Change how containers of the image run, by an instruction of a Dockerfile: CMD, ENTRYPOINT, ENV,"
    " EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR. May be repeated.",
)


def made_by(program: str, changes: Sequence[str]) -> str:
    """What the history says of a command, unless somebody says something else."""
    return " ".join((program, *(f"--change {shlex.quote(each)}" for each in changes)))


def image_options(command: Callable[..., int]) -> Callable[..., int]:
    """Adds --layout and what belongs to it; `command` gets them as `target`, a `Target` or None."""

    @click.option(
        "--layout",
        metavar="DIR[:TAG]",
        help="Make an image of the layer, in the OCI image layout DIR, which is made when it is not there."
        " [default of TAG: latest]",
    )
    @click.option(
        "--base",
        metavar="IMAGE",
        help="The image that the layer goes upon: DIR:TAG, DIR@sha256:..., or FILE.tar[:REPO:TAG] as docker"
        " save writes it. Without it the image has this layer alone.",
    )
    @message_option
    @author_option
    @click.option(
        "--created-by",
        metavar="TEXT",
        help="For the image's history. [default: this command and its changes]",
    )
    @change_option
    @wraps(command)
    def told(
        *arguments: Any,
        layout: str | None,
        base: str | None,
        message: str | None,
        author: str,
        created_by: str | None,
        changes: tuple[str, ...],
        **rest: Any,
    ) -> int:
        if layout is None:
            if base or message or author or created_by or changes:
                raise UsageError("--base, --message, --author, --created-by and --change need --layout")
            return command(*arguments, target=None, **rest)
        # Documents of images take 30 ms to import; most layers go into none.
        from layerfs.oci.append import ImageOptions
        from layerfs.oci.references import open_image, split_new_reference

        path, tag = split_new_reference(layout)
        if created_by is None:
            created_by = made_by("layerfs commit", changes)
        options = ImageOptions(created_by, message or "", author, changes)
        target = Target(path, tag, open_image(base) if base is not None else None, options)
        return command(*arguments, target=target, **rest)

    return told


def commit_image(
    target: Target, source: Reading, options: CommitOptions, progress: Progress
) -> tuple[Summary, Appended]:
    """Makes the image. Raises UsageError, LayerError."""
    from layerfs.oci.append import append_layer

    stack = source.stack
    _refuse_inside(target.path, source)
    _compare_with_base(target, stack)
    summary: Summary | None = None

    def write(fd: int) -> Written | None:
        nonlocal summary
        summary = write_layer(stack, fd, options, progress, snapshots=source.snapshots)
        source.check()
        changed = summary.added or summary.changed or summary.deleted
        return summary.written if changed or target.base is None else None

    appended = append_layer(target.path, target.tag, target.base, target.options, write)
    assert summary is not None
    if target.base is not None and not appended.same:
        tell_completed("layerfs commit", target.base)
    return summary, appended


def tell_completed(program: str, base: Image) -> None:
    """A note where the new image has a better history than its base."""
    if fault := base.config.history_fault:
        talk.note(program, f"{fault}: completed in the new one")


def _compare_with_base(target: Target, stack: Stack) -> None:
    """Where the lowers are layers of images, --base has to be that image: upon another one the layer would
    hide and replace what it never saw."""
    cached = _cached_layers(stack)
    if not cached:
        return
    if target.base is None:
        talk.note(
            "layerfs commit",
            "this was changed in an image, and without --base the new image has the changed files alone",
        )
        return
    # a layer that comes twice is mounted once, and what an opaque root hides is not mounted at all
    expected = list(dict.fromkeys(layer.diff_id for layer in reversed(target.base.layers)))
    if expected[: len(cached)] != cached:
        raise UsageError(
            f"{display(os.fsencode(target.base.reference))}: is not the image that was changed: "
            "give --base the one that is mounted"
        )


def _cached_layers(stack: Stack) -> list[DiffId]:
    """The layers of images among the lowers, top first."""
    from layerfs.oci.cache import LayerCache, default_path

    place = os.path.realpath(default_path()) + os.sep
    paths = [os.path.realpath(lower.path) for lower in stack.lowers]
    if not any(path.startswith(place) for path in paths):
        return []
    cache = LayerCache.default()
    return [diff_id for path in paths if (diff_id := cache.diff_id_of(path)) is not None]


def image_lines(target: Target, appended: Appended) -> list[str]:
    told = f"{target}, {appended.layers} layer{'s' if appended.layers != 1 else ''}"
    if appended.same:
        told += "; nothing has changed: this is the base"
    elif not appended.added:
        told += "; no file has changed: none is new"
    return [
        f"Image    {appended.image_id}",
        f"Manifest {appended.manifest.digest}",
        f"Tag      {told}",
    ]


def image_as_json(target: Target, appended: Appended) -> dict[str, object]:
    return {
        "image": {
            "id": appended.image_id,
            "manifest": appended.manifest.digest,
            "layout": target.path,
            "tag": target.tag,
            "layers": appended.layers,
            "layer_added": appended.added,
            "same_as_base": appended.same,
        }
    }


def _refuse_inside(path: str, source: Reading) -> None:
    """A layout in the upper would be part of what it is made of."""
    assert source.stack.upper is not None
    try:
        fd = OwnedFd(os.open(nearest_directory(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise UsageError(f"{display(os.fsencode(path))}: {error.strerror}") from None
    if is_inside(fd.fd, source.stack.upper.fd.fd):
        raise UsageError(f"{display(os.fsencode(path))}: lies in the upper directory: name another place")
