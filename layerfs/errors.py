"""The error tree of layerfs. Messages are one line and say what to do; nothing here prints.

    LayerfsError            exit 1
    ├── UsageError          exit 2   the command line is wrong
    ├── MountError          exit 1   a mount cannot be made or ended
    │   └── BusyError       exit 1   somebody else holds the upper, the work directory or the mount point
    └── LayerError          exit 1   a layer's content is unusable
        ├── TarError        exit 1   a layer tarball is malformed or hostile
        └── ImageError      exit 1   an image's documents or blobs are malformed, damaged, missing or hostile

Inside the file system itself an operation that fails raises plain `OSError` with the errno the caller gets;
the adapter passes it on.
"""

from __future__ import annotations

import errno as _errno


class LayerfsError(Exception):
    """Base of all errors a user can cause. `str(error)` is the one line to show."""

    exit_code: int = 1

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class UsageError(LayerfsError):
    exit_code = 2


class MountError(LayerfsError):
    pass


class BusyError(MountError):
    def __init__(self, message: str, errno: int | None = _errno.EBUSY) -> None:
        super().__init__(message, errno)


class LayerError(LayerfsError):
    def __init__(self, message: str, errno: int | None = _errno.EIO) -> None:
        super().__init__(message, errno)


class TarError(LayerError):
    pass


class ImageError(LayerError):
    pass
