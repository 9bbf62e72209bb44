"""What a mount is made of, as plain values. Opens nothing and checks nothing (`layerfs.vfs.checks` does)."""

from __future__ import annotations

from dataclasses import dataclass

from layerfs.overlay.owners import AS_STORED, Owners


@dataclass(frozen=True)
class StackConfig:
    """The layers of one mount and how they are to be written.

    Paths are `str` as the command line gave them, undecodable bytes as surrogate escapes (`os.fsencode`
    gives the bytes back); they are resolved by the kernel, never by text.
    """

    #: Read-only layers, top first.
    lowers: tuple[str, ...]
    #: The writable layer; None: nothing can be written.
    upper: str | None = None
    #: Scratch directory on the same file system as `upper`; given whenever `upper` is.
    work: str | None = None
    #: Skip every sync and leave the kernel's marker in `work` (CONTRACTS 1).
    volatile: bool = False
    #: Rename a lower or merged directory by writing `overlay.redirect`; off: copy it up.
    redirect_dir: bool = True
    #: Copy attributes up without data (`overlay.metacopy`); off: always copy data.
    metacopy: bool = True
    #: xattr prefix `user.overlay.` (True) or `trusted.overlay.` (False); None: `trusted.` where it can be
    #: set.
    userxattr: bool | None = None
    #: EROFS for everything that would write, though `upper` may be given and is then shown.
    read_only: bool = False
    #: How the owners that layers store are shown.
    owners: Owners = AS_STORED
    #: Owner, mode and type of objects in xattrs (`overlay.override`): 0 not, 1 in `security.` ones, 2 in
    #: `user.` ones.
    xattr_permissions: int = 0
    #: Extended attributes can be read and set through the mount.
    xattrs: bool = True
    #: The kernel heeds ACLs.
    acl: bool = True
    #: The native gate answers what it knows; None: where it can be had.
    gate: bool | None = None
    #: The kernel reads and writes files itself; it takes the gate.
    passthrough: bool = False
    #: How many names may be loaded, about (`vfs.unload`); it takes the gate.
    max_names: int = 1_000_000
