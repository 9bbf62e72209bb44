"""What a user calls an image by, and where it is opened. Reads no image itself.

    DIR[:TAG]  DIR@sha256:HEX             an OCI image layout
    FILE.tar[:REPO:TAG]  FILE.tar@ID      what `docker save` writes, or an OCI image layout in a tar

A path may hold colons: the longest beginning that exists is the path.
"""

from __future__ import annotations

import os
import re

from layerfs.errors import ImageError, UsageError
from layerfs.ids import Digest
from layerfs.oci.docker_archive import DockerArchive
from layerfs.oci.image import Image
from layerfs.oci.layout import Layout, check_tag
from layerfs.oci.member import display
from layerfs.oci.resolve import DEFAULT_TAG, find, load

_DIGEST = re.compile(r"(.+)@(sha(?:256|512):[0-9a-fA-F]*)", re.DOTALL)


def split_reference(reference: str) -> tuple[str, str | Digest | None]:
    """Path, and tag or digest, of a reference to something that exists. Raises UsageError, ImageError."""
    match = _DIGEST.fullmatch(reference)
    if match is not None:
        return match[1], Digest(match[2])
    path: str = reference
    while not os.path.exists(path):
        path, colon, _ = path.rpartition(":")
        if not colon or not path:
            shown = display(os.fsencode(reference))
            raise ImageError(
                f"{shown}: no such image: give DIRECTORY:TAG or the FILE.tar of a docker archive"
            )
    tag = reference[len(path) + 1 :]
    if len(path) < len(reference) and not tag:
        raise UsageError(f"{display(os.fsencode(reference))}: there is nothing behind the colon")
    return path, tag or None


def split_new_reference(reference: str) -> tuple[str, str]:
    """Directory and tag of a reference to an image that is to be written. Raises UsageError, also for what
    cannot be a tag."""
    if _DIGEST.fullmatch(reference):
        raise UsageError(f"{display(os.fsencode(reference))}: an image is written under a tag, not a digest")
    try:
        path, given = split_reference(reference)
        tag = given or DEFAULT_TAG
    except ImageError:  # it is not there yet
        path, colon, tag = reference.rpartition(":")
        if not colon or "/" in tag:
            path, tag = reference, DEFAULT_TAG
        if not path or not tag:
            raise UsageError(f"{display(os.fsencode(reference))}: give DIRECTORY:TAG") from None
    check_tag(tag)
    return path, tag


def open_image(reference: str) -> Image:
    """The image that `reference` names; of several platforms the one that suits this machine. Its documents
    are read and verified, its layers are not. Raises ImageError, UsageError."""
    path, wanted = split_reference(reference)
    try:
        if not os.path.isdir(path):
            return DockerArchive(path).image(wanted, reference)
        layout = Layout.open(path)
        return load(layout, find(layout, wanted), wanted, reference)
    except ImageError as error:
        raise ImageError(f"{display(os.fsencode(path))}: {error}", error.errno) from None
