"""What was done since the mount, in numbers, for whoever asks. Whoever does it counts it."""

from __future__ import annotations

from layerfs.fdutil import Copied


class Tally:
    __slots__ = ("copied", "directories", "files", "metadata_only", "read", "reflinked", "written")

    def __init__(self) -> None:
        #: directories that were copied up
        self.directories = 0
        #: everything else that was: one whose data come later (metadata-only) counts then once more
        self.files = 0
        #: those of `files` without data, though they have some
        self.metadata_only = 0
        #: those of `files` whose data were cloned
        self.reflinked = 0
        #: bytes of data copied for `files`: neither clones nor holes
        self.copied = 0
        #: bytes read from files and written to them, without those that the kernel or a gate moved
        self.read = 0
        self.written = 0

    def copied_up(self, data: Copied, *, metacopy: bool = False) -> None:
        """A finished copy of anything but a directory is seen now."""
        self.files += 1
        self.metadata_only += metacopy
        self.reflinked += data.cloned
        self.copied += data.bytes
