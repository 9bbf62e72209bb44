"""Grammar of mount options: one string as mount(8), podman and kernel overlayfs write it, to values and back.

Pure text work: opens no path, knows no FUSE, prints nothing. What to do about an option that nobody knows is
the caller's choice (`layerfs mount` refuses it, `mount.layerfs` notes and ignores it).

Grammar (fs/overlayfs/params.c `ovl_next_opt`, `ovl_unescape`; quotes as libmount's optstr):

    options  = option *( "," option )
    option   = name [ "=" value ]
    lowerdir = path *( ":" path )                 top first
    escapes    "\\" followed by any character stands for that character: "\\:" "\\," "\\\\"
    quotes     context="…" and its kin may hold "," and ":" between double quotes

Newlines and all other bytes stand for themselves. Text is `str` with surrogate escapes, as `sys.argv` has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

from layerfs.errors import UsageError
from layerfs.overlay.owners import AS_STORED, IdMap, IdRange, Owners, parse_id, parse_ranges


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Options that shape the mount in the kernel and that libfuse and fusermount3 know how to set.
_MOUNT_FLAGS = _words(
    "suid nosuid dev nodev exec noexec async sync dirsync noatime nodiratime symfollow nosymfollow"
)
#: Each wins over the one it stands against, the later over the earlier.
_OPPOSITES = {
    "suid": "nosuid", "nosuid": "suid", "dev": "nodev", "nodev": "dev", "exec": "noexec", "noexec": "exec",
    "async": "sync", "sync": "async", "symfollow": "nosymfollow", "nosymfollow": "symfollow",
}  # fmt: skip
#: FUSE's own options that are handed on as they are.
_FUSE_FLAGS = _words("allow_other allow_root default_permissions")
_FUSE_VALUES = _words("max_read fsname")
#: SELinux labels of a whole mount; their values may be quoted.
CONTEXTS = _words("context fscontext defcontext rootcontext")
#: Access times as the kernel has them by default, or as FUSE cannot: they only take `noatime` back.
_ATIME = _words("atime relatime strictatime diratime norelatime nostrictatime lazytime nolazytime")
#: For mount(8), fstab and systemd alone.
_USERLAND = _words(
    "defaults auto noauto user users nouser owner group nofail _netdev comment loud silent mand nomand"
    " iversion noiversion helper uhelper"
)
#: Kernel overlayfs options that change nothing here: layerfs gives what they switch on, whatever they say.
_KERNEL_NO_EFFECT = _words("index nfs_export xino uuid")


class Verdict(Enum):
    """What becomes of an option of fuse-overlayfs or of libfuse that callers pass."""

    HONOURED = "does here what it does there"
    IGNORED = "changes nothing that a user of the mount could miss; passed over in silence"
    NOTED = "cannot be had, and a mount without it still shows the right tree; ignored with a note"
    REFUSED = "ignoring it would show another tree"


@dataclass(frozen=True)
class Decision:
    """`value` is how fuse-overlayfs declares the option: None for a bare word, else what stands behind `=`;
    an option in another form is one that nobody knows, as it is there (fuse_opt(3))."""

    verdict: Verdict
    value: Literal["integer", "text"] | None
    why: str


#: Options of fuse-overlayfs (1.10 and later) that are not also the kernel's or mount(8)'s, decided one by
#: one. Those with a meaning of their own in `parse_options` (lowerdir, uidmapping, volatile, …) are not here.
FUSE_OVERLAYFS: Final[dict[str, Decision]] = {
    "noacl": Decision(Verdict.HONOURED, None, "ACLs count no more when access is checked"),
    "noxattrs": Decision(Verdict.HONOURED, "integer", "extended attributes give EOPNOTSUPP"),
    "xattr_permissions": Decision(Verdict.HONOURED, "integer", "owners and modes kept in xattrs"),
    "plugins": Decision(Verdict.REFUSED, "text", "a plugin would provide layers, and there are none"),
    "ino32_t": Decision(Verdict.NOTED, None, "inode numbers have 64 bits, so that they stay the same"),
    "auto_unmount": Decision(Verdict.NOTED, None, "the next mount or `layerfs umount` clears a dead mount"),
    "timeout": Decision(Verdict.IGNORED, "text", "the kernel may cache for ever: only layerfs changes it"),
    "threaded": Decision(Verdict.IGNORED, "integer", "long work is done in threads anyway"),
    "fsync": Decision(Verdict.IGNORED, "integer", "fsync=0 costs time when ignored; volatile is honoured"),
    "fast_ino": Decision(Verdict.IGNORED, "integer", "a check of inode numbers that is not needed"),
    "writeback": Decision(Verdict.IGNORED, "integer", "a matter of speed"),
    "static_nlink": Decision(Verdict.IGNORED, None, "links of a directory are never counted"),
    "debug": Decision(Verdict.IGNORED, None, "LAYERFS_LOG=FILE keeps what the daemon has to say"),
    "splice_read": Decision(Verdict.IGNORED, None, "libfuse's, a matter of speed"),
    "splice_write": Decision(Verdict.IGNORED, None, "libfuse's, a matter of speed"),
    "splice_move": Decision(Verdict.IGNORED, None, "libfuse's, a matter of speed"),
    "kernel_cache": Decision(Verdict.IGNORED, None, "always so"),
    "max_write": Decision(Verdict.IGNORED, None, "what the kernel offers is taken"),
    "clone_fd": Decision(Verdict.IGNORED, None, "libfuse's, a matter of speed"),
    "max_idle_threads": Decision(Verdict.IGNORED, "integer", "libfuse's, a matter of speed"),
}

#: Way of the bytes of files: whether it needs the gate.
_DATA = {"python": False, "cached": True, "passthrough": True}
_BOOLEAN = {"on": True, "off": False}
#: Kernel: `follow` and `nofollow` differ from `off` only in reading; nothing new is written under any of
#: them.
_REDIRECT = {"on": True, "off": False, "follow": False, "nofollow": False}


@dataclass(frozen=True)
class MountOptions:
    """What an option string says. None: it says nothing about this."""

    lowers: tuple[str, ...] = ()
    upper: str | None = None
    work: str | None = None
    volatile: bool = False
    redirect_dir: bool | None = None
    metacopy: bool | None = None
    userxattr: bool | None = None
    read_only: bool = False
    owners: Owners = AS_STORED
    #: Owner, mode and type are kept in xattrs: 0 not, 1 in `security.` ones, 2 in `user.` ones.
    xattr_permissions: int = 0
    #: Extended attributes can be read and set.
    xattrs: bool = True
    #: The kernel heeds ACLs.
    acl: bool = True
    #: The native gate answers what it knows; None: where it can be had.
    gate: bool | None = None
    #: The kernel reads and writes files itself.
    passthrough: bool = False
    #: Names that may be kept in memory, about; None: as many as layerfs likes.
    max_names: int | None = None
    #: Options for the mount itself in the order of their last mention, e.g. `noatime`, `max_read=65536`.
    fuse: tuple[str, ...] = ()
    #: Access times were asked for by name, which takes back the default `noatime`.
    atime: bool = False
    #: Known to be fuse-overlayfs's and without effect here, as written.
    ineffective: tuple[str, ...] = ()
    #: Known to nobody, or not to be had (`Verdict.NOTED`), as written.
    unknown: tuple[str, ...] = ()


@dataclass
class _Mapping:
    """What has been said of the ids of users, or of groups."""

    ranges: tuple[IdRange, ...] = ()
    squash: int | None = None

    def done(self) -> IdMap:
        return IdMap(self.ranges, self.squash)


@dataclass
class _Parsing:
    uid: _Mapping = field(default_factory=_Mapping)
    gid: _Mapping = field(default_factory=_Mapping)
    lowers: list[str] = field(default_factory=list)
    fuse: dict[str, str] = field(default_factory=dict)
    ineffective: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    xattr_permissions: int = 0
    xattrs: bool = True
    acl: bool = True

    def of_fuse_overlayfs(self, option: str) -> None:
        """One that `FUSE_OVERLAYFS` decides. Raises UsageError."""
        name, equals, value = option.partition("=")
        decision = FUSE_OVERLAYFS[name]
        if bool(equals) != (decision.value is not None):
            self.unknown.append(option)
            return
        if decision.value == "integer" and not re.fullmatch("[+-]?[0-9]{1,9}", value):
            raise UsageError(f"option {option}: must be a number")
        if name == "noacl":
            self.acl = False
        elif name == "noxattrs":
            self.xattrs = int(value) == 0
        elif name == "xattr_permissions":
            if value not in ("0", "1", "2"):
                raise UsageError(f"option {option}: must be 0, 1 or 2")
            self.xattr_permissions = int(value)
        elif decision.verdict is Verdict.NOTED:
            self.unknown.append(option)
        elif decision.verdict is Verdict.REFUSED and value:
            raise UsageError(f"option {option}: {decision.why}")
        else:
            self.ineffective.append(option)


def _split(text: str, separator: str) -> list[str]:
    """Split at each `separator` that is not escaped; the escapes stay in the pieces."""
    pieces: list[str] = []
    start = position = 0
    while position < len(text):
        if text[position] == "\\":
            position += 2
            continue
        if text[position] == separator:
            pieces.append(text[start:position])
            start = position + 1
        position += 1
    pieces.append(text[start:])
    return pieces


def split_options(text: str) -> list[str]:
    """Split an option string into options, escapes and quotes kept; empty options are left out.

    A quote opens only right after the `=` of a label option: a path may hold quote characters.
    Raises UsageError where it is not closed.
    """
    options: list[str] = []
    rest = text
    while rest:
        name, equals, value = rest.partition('="')
        if equals and name in CONTEXTS:
            end = value.find('"')
            if end < 0:
                raise UsageError(f"the quote of option {name} is not closed")
            tail = value[end + 1 :]
            if tail and not tail.startswith(","):
                raise UsageError(f"option {name}: text after the closing quote")
            options.append(f'{name}="{value[:end]}"')
            rest = tail[1:]
            continue
        piece = _split(rest, ",")[0]
        if piece:
            options.append(piece)
        rest = rest[len(piece) + 1 :]
    return options


def unescape(text: str) -> str:
    """Take the escapes out of one path. A backslash at the very end stands for itself."""
    if "\\" not in text:
        return text
    result: list[str] = []
    characters = iter(text)
    for character in characters:
        result.append(next(characters, character) if character == "\\" else character)
    return "".join(result)


def escape(path: str) -> str:
    """Write one path so that it can stand in `lowerdir=`, `upperdir=` or `workdir=`. Inverse of
    `unescape`.
    """
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def parse_lowerdir(value: str) -> list[str]:
    """The layers of a `lowerdir=` value, top first. Raises UsageError for an empty one or for data-only
    layers.
    """
    pieces = _split(value, ":")
    if "" in pieces:
        if len(pieces) > 1 and "::" in value:
            raise UsageError("lowerdir: data-only layers (after '::') are not supported")
        raise UsageError("lowerdir: an empty path among the layers")
    return [unescape(piece) for piece in pieces]


def format_lowerdir(lowers: Iterable[str]) -> str:
    """The `lowerdir=` value that `parse_lowerdir` reads as `lowers`."""
    return ":".join(escape(lower) for lower in lowers)


def _choice(name: str, value: str | None, choices: dict[str, bool]) -> bool:
    if value not in choices:
        raise UsageError(f"option {name}: must be one of {', '.join(choices)}")
    return choices[value]


def _path(name: str, value: str | None) -> str:
    if not value:
        raise UsageError(f"option {name}: a path is missing")
    return unescape(value)


def parse_options(strings: Iterable[str]) -> MountOptions:
    """Read the values of all `-o`, in order; the later wins. Raises UsageError for what is known and
    wrong.
    """
    state = _Parsing()
    upper = work = None
    volatile = read_only = atime = passthrough = False
    redirect_dir = metacopy = userxattr = gate = data = max_names = None
    for option in (option for text in strings for option in split_options(text)):
        name, equals, raw = option.partition("=")
        value = raw if equals else None
        if name == "lowerdir":
            state.lowers = parse_lowerdir(_path_given(name, value))
        elif name == "lowerdir+":
            state.lowers.append(_path(name, value))
        elif name == "datadir+":
            raise UsageError("datadir+: data-only layers are not supported")
        elif name == "upperdir":
            upper = _path(name, value)
        elif name == "workdir":
            work = _path(name, value)
        elif name == "volatile" and value is None:
            volatile = True
        elif name == "gate":
            gate = _choice(name, value, _BOOLEAN)
        elif name == "data":
            data = _choice(name, value, _DATA)
            passthrough = value == "passthrough"
        elif name == "max_names":
            max_names = _count(name, value)
        elif name == "redirect_dir":
            redirect_dir = _choice(name, value, _REDIRECT)
        elif name == "metacopy":
            metacopy = _choice(name, value, _BOOLEAN)
        elif name == "userxattr" and value is None:
            userxattr = True
        elif name in ("ro", "rw") and value is None:
            read_only = name == "ro"
        elif name == "remount":
            raise UsageError("a mounted layerfs takes its options from the kernel: mount -i -o remount,...")
        elif name == "verity":
            if value != "off":
                raise UsageError(
                    "option verity: fs-verity digests are not checked; leave it out or say verity=off"
                )
        elif name in ("uidmapping", "gidmapping"):
            getattr(state, name[:3]).ranges = parse_ranges(name, value or "")
        elif name in ("squash_to_uid", "squash_to_gid"):
            getattr(state, name[-3:]).squash = parse_id(name, value)
        elif name == "squash_to_root" and value in (None, "1"):
            state.uid.squash = state.gid.squash = 0
        elif name in _MOUNT_FLAGS and value is None:
            state.fuse.pop(name, None)
            state.fuse.pop(_OPPOSITES.get(name, ""), None)
            state.fuse[name] = name
            atime = atime and name != "noatime"
        elif name in _ATIME and value is None:
            state.fuse.pop("noatime", None)
            atime = True
        elif (name in _FUSE_FLAGS and value is None) or (name in _FUSE_VALUES and value):
            state.fuse.pop(name, None)
            state.fuse[name] = option
        elif name in CONTEXTS and value:
            state.fuse[name] = option
        elif name in _USERLAND or name[:2] in ("x-", "X-") or name in _KERNEL_NO_EFFECT:
            pass
        elif name in FUSE_OVERLAYFS:
            state.of_fuse_overlayfs(option)
        else:
            state.unknown.append(option)
    if None not in (gate, data) and gate is not data:
        raise UsageError("options gate and data: data=python is without the gate, the others are with it")
    return MountOptions(
        lowers=tuple(state.lowers),
        upper=upper,
        work=work,
        volatile=volatile,
        redirect_dir=redirect_dir,
        metacopy=metacopy,
        userxattr=userxattr,
        read_only=read_only,
        owners=Owners(state.uid.done(), state.gid.done()),
        xattr_permissions=state.xattr_permissions,
        xattrs=state.xattrs,
        acl=state.acl,
        gate=gate if data is None else data,
        passthrough=passthrough,
        max_names=max_names,
        fuse=tuple(state.fuse.values()),
        atime=atime,
        ineffective=tuple(state.ineffective),
        unknown=tuple(state.unknown),
    )


def _count(name: str, value: str | None) -> int:
    if value is None or not re.fullmatch(r"[1-9][0-9]{0,11}", value):
        raise UsageError(f"option {name}: a positive number is missing")
    return int(value)


def _path_given(name: str, value: str | None) -> str:
    if not value:
        raise UsageError(f"option {name}: a path is missing")
    return value


def kernel_mount_options(
    options: MountOptions, *, root: bool, read_only: bool, labels: bool = False, source: str | None = None
) -> tuple[frozenset[str], list[str]]:
    """The options to mount with, defaults included (CONTRACTS 2.10), and notes on those that had to be
    dropped.

    `root`: effective uid 0. An ordinary user mounts through fusermount3, which sets nosuid and nodev itself.
    `labels`: the kernel knows SELinux labels; without it would refuse `context=`, which podman may say all
    the same. `source`: what mountinfo shows as the mounted device. Escaped as libfuse's fuse_opt wants it.
    """
    fsname = (source or "layerfs").replace("\\", "\\\\").replace(",", "\\,")
    chosen: dict[str, str] = {
        "default_permissions": "default_permissions",
        "fsname": f"fsname={fsname}",
        "subtype": "subtype=layerfs",
    }
    if root:
        chosen.update({name: name for name in ("allow_other", "suid", "dev")})
    if not options.atime:
        chosen["noatime"] = "noatime"
    notes: list[str] = []
    for option in options.fuse:
        name = option.partition("=")[0]
        if not root and name in ("suid", "dev"):
            notes.append(f"option {name} ignored: only root may set it")
            continue
        if name in CONTEXTS:
            if labels:
                chosen[name] = option.replace("\\", "\\\\").replace(",", "\\,")
            continue
        chosen.pop(_OPPOSITES.get(name, ""), None)
        if name == "allow_root":
            chosen.pop("allow_other", None)
        chosen[name] = option
    if read_only:
        chosen["ro"] = "ro"
    return frozenset(chosen.values()), notes
