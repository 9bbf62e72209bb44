"""From the name of an image to layer directories that can be mounted, shown on a terminal. What
`layerfs mount` needs for images only: a mount of directories does not import it."""

from __future__ import annotations

import resource
from collections.abc import Callable

from layerfs.cli import progress
from layerfs.cli.launching import interruptible
from layerfs.oci.cache import LayerCache
from layerfs.oci.references import open_image


def unpacked(reference: str, note: Callable[[str], None]) -> list[str]:
    """The layer directories of the image `reference`, top first; what the cache does not have is unpacked
    into it. Raises LayerfsError."""
    _open_many_files()
    image = open_image(reference)
    cache = LayerCache.default()
    with interruptible(), progress.bar("unpacking") as bar:
        directories = cache.layer_directories(image, bar)
    for line in cache.notes:
        note(line)
    return directories


def _open_many_files() -> None:
    """A layer over 500 others has them all open, twice; 1024 is a common soft limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
