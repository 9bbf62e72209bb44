"""Tells which on-disk forms an upper directory holds, and so which options the kernel's overlayfs needs to
read it.

Reads only, and needs no mount. The rules of what the kernel takes together are CONTRACTS 1
(fs/overlayfs/params.c `ovl_fs_params_verify`).
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from layerfs.overlay.names import FOREIGN, TRUSTED, USER
from layerfs.overlay.whiteout import OPAQUE, OPAQUE_NAME, PREFIX, XWHITEOUTS, hidden_name, is_whiteout_device

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class UpperForms:
    """Counts of what was found below an upper directory, its root included."""

    #: form -> number of objects carrying it, for example `redirect`, `whiteout-device`.
    counts: Counter[str] = field(default_factory=Counter)
    #: Prefixes of overlay xattrs seen.
    prefixes: set[str] = field(default_factory=set)
    #: Objects looked at, and those that could not be.
    objects: int = 0
    unreadable: int = 0

    def kernel_options(self) -> list[str] | None:
        """Options with which kernel overlayfs reads this upper as layerfs does; None: none do (see
        `obstacles`).
        """
        if self.obstacles():
            return None
        options = []
        if USER in self.prefixes:
            options.append("userxattr")
        if self.counts["redirect"] or self.counts["metacopy"]:
            options.append("redirect_dir=on")
        if self.counts["metacopy"]:
            options.append("metacopy=on")
        return options

    def obstacles(self) -> list[str]:
        """Why the kernel cannot read this upper, each in a few words; empty when it can."""
        found = []
        if len(self.prefixes) > 1:
            found.append("both trusted.overlay.* and user.overlay.* attributes are present")
        elif USER in self.prefixes:
            marks = [name for name in ("redirect", "metacopy") if self.counts[name]]
            if marks:
                found.append(f"user.overlay.* attributes with {' and '.join(marks)}: the kernel refuses them")
        for form, text in (
            ("whiteout-file", f"whiteouts in the form {os.fsdecode(PREFIX)}NAME"),
            ("opaque-file", f"opaque marks in the form {os.fsdecode(OPAQUE_NAME)}"),
            ("foreign", "attributes of fuse-overlayfs or containers/storage"),
        ):
            if self.counts[form]:
                found.append(f"{self.counts[form]} {text}")
        return found


def scan_upper(path: str) -> UpperForms:
    """Look at everything below `path`; other file systems mounted in it are left out. Raises OSError for
    `path` itself.
    """
    forms = UpperForms()
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    device = os.fstat(top).st_dev
    _note_attributes(forms, b"/proc/self/fd/%d" % top, follow=True)
    forms.objects += 1
    # One descriptor for each level, none of the names joined: a tree may be deeper than PATH_MAX allows.
    pending: list[tuple[int, Iterator[os.DirEntry[str]]]] = [(top, os.scandir(top))]
    try:
        while pending:
            directory, entries = pending[-1]
            entry = next(entries, None)
            if entry is None:
                pending.pop()
                os.close(directory)
                continue
            forms.objects += 1
            try:
                status = os.stat(entry.name, dir_fd=directory, follow_symlinks=False)
                _note(forms, directory, os.fsencode(entry.name), status)
                if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                    below = os.open(entry.name, _DIRECTORY, dir_fd=directory)
                    pending.append((below, os.scandir(below)))
            except OSError:
                forms.unreadable += 1
    finally:
        for directory, _ in pending:
            os.close(directory)
    return forms


def _note(forms: UpperForms, directory: int, name: bytes, status: os.stat_result) -> None:
    if is_whiteout_device(status):
        forms.counts["whiteout-device"] += 1
        return
    if name == OPAQUE_NAME:
        forms.counts["opaque-file"] += 1
    elif stat.S_ISREG(status.st_mode) and hidden_name(name) is not None:
        forms.counts["whiteout-file"] += 1
    _note_attributes(forms, b"/proc/self/fd/%d/%b" % (directory, name), follow=False)


def _note_attributes(forms: UpperForms, path: bytes, *, follow: bool) -> None:
    for attribute in os.listxattr(path, follow_symlinks=follow):
        if attribute.startswith(FOREIGN):
            forms.counts["foreign"] += 1
            continue
        prefix = next((each for each in (TRUSTED, USER) if attribute.startswith(each)), None)
        if prefix is None:
            continue
        name = attribute[len(prefix) :]
        if name.startswith("overlay."):
            forms.counts["nested"] += 1  # a user's own, escaped: the kernel shows it as we do
            continue
        forms.prefixes.add(prefix)
        if name == "opaque":
            value = os.getxattr(path, attribute, follow_symlinks=follow)
            name = {OPAQUE: "opaque", XWHITEOUTS: "opaque-x"}.get(value, "opaque-other")
        forms.counts["whiteout-xattr" if name == "whiteout" else name] += 1
