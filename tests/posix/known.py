"""Known failures, each with its reason. Each is an xfail(strict): a fix must take its line out of here.

`KERNEL`: where Linux overlayfs (redirect_dir=on,metacopy=on, index=off) is not POSIX; or, where a row says
so, where layers made by hand lack what an upper written by the kernel itself would have.
`NO_GATE`: what pyfuse3 cannot carry, on mounts without the native gate, which closes them all: with it
nothing is known to fail. Nothing else may ever be added to it.
"""

from __future__ import annotations

import re

# Rows: pattern of the test's name with its parameters, file system left out; arrangements; reason.
Row = tuple[str, tuple[str, ...], str]

UPPER, LOWER, MERGED, DEEP = "all-upper", "all-lower", "merged", "deep30"
ALL = (UPPER, LOWER, MERGED, DEEP)
COPIED = (LOWER, MERGED, DEEP)

LINKS = "kernel: with index=off a hard link breaks at copy-up: other names keep the old inode, data and count"
CTIME = "kernel: copy-up sets ctime, of the object and of every directory above it, and shows it"
HOLES = "kernel: data copy-up looks for holes in steps of 1 MiB only"
D_INO = "kernel: d_ino differs from st_ino where an upper entry made by hand has no origin xattr"
MAPPED = "kernel: a mapping made before the copy-up keeps the lower data"
LOWER_GONE = "kernel: an unlinked lower file keeps its link count (it is still there, whited out)"

METACOPY = "kernel: the data copy-up of a file that was copied up with attributes alone sets its mtime"
REOPEN = "kernel: an unlinked lower file cannot be opened again for writing (copy-up fails with EEXIST)"
EMPTY_ACL = "kernel: removing an ACL that is not there is ENODATA, on a plain directory it succeeds"

KERNEL: list[Row] = [
    (r"test_(chmod|chown)\[linked-.*\]|test_chmod_shows_under_every_name", COPIED, LINKS),
    (r"test_append_by_path\[h1\]|test_link\[h1\]|test_link_counts|test_linked_specials", COPIED, LINKS),
    (r"test_all_names_stay_linked\[.*\]|test_exchange_of_linked_names", (LOWER, DEEP), LINKS),
    (
        r"test_unlink_and_rename_of_linked_names|test_two_hundred_names|test_locks_of_two_names_are_one",
        COPIED,
        LINKS,
    ),
    (r"test_open_descriptor_while_all_names_are_copied_up|test_all_names_see_a_write", COPIED, LINKS),
    (r"test_trunc_of_a_hard_linked_file_shows_under_every_name", COPIED, LINKS),
    (r"test_unlink_one_of_two_names_while_open|test_two_names_of_one_file", COPIED, LINKS),
    (r"test_rename_keeps_everything|test_replacing_a_name_drops_its_link_count", COPIED, LINKS),
    (r"test_through_a_descriptor_and_other_names", COPIED, LINKS),
    (r"test_ctime\[(?!nothing|read|list|stat|failed|exchange dirs|rename dir across).*\]", COPIED, CTIME),
    (r"test_(holes_after_copy_up|copy_up_does_not_fill_holes)\[(end|middle)\]", COPIED, HOLES),
    (r"test_chmod_keeps_content_and_holes", COPIED, HOLES),
    (r"test_type_and_inode_agree_with_lstat\[fresh\]", (MERGED, DEEP), D_INO),
    (r"test_scandir_types", (MERGED,), D_INO),
    (r"test_type_and_inode_agree_with_lstat\[stat first\]|test_dot_and_dot_dot", (DEEP,), D_INO),
    (r"test_mapping_read_only_lower_file_sees_a_later_write", COPIED, MAPPED),
    (r"test_mtime_is_kept_when_data_follow_metadata", COPIED, METACOPY),
    (r"test_read_only_unlinked_but_open", COPIED, LOWER_GONE),
    (r"test_reopen_an_unlinked_file", (LOWER, DEEP), REOPEN),
    (r"test_acl_errors", (LOWER, DEEP), EMPTY_ACL),
]

TMPFILE = "pyfuse3 has no TMPFILE"
FALLOCATE = "pyfuse3 has no FALLOCATE"
SEEK = "pyfuse3 has no LSEEK: SEEK_HOLE and SEEK_DATA see data everywhere"
IOCTL = "pyfuse3 has no IOCTL"
BTIME = "pyfuse3 has no STATX: no birth time"
UMASK = (
    "pyfuse3 cannot ask for DONT_MASK: the kernel applies the umask where a default ACL should take its place"
)
KILLPRIV = "pyfuse3 cannot ask for HANDLE_KILLPRIV_V2: a write does not say whether setuid and setgid go"

NO_GATE: list[Row] = [
    (r"test_tmpfile_\w+", ALL, TMPFILE),
    (
        r"test_fallocate_grows\[.*\]|test_keep_size|test_punch_hole\[.*\]|test_zero_range",
        ALL,
        FALLOCATE,
    ),
    (r"test_[mc]time\[fallocate( same)?\]|test_writing_clears_setuid\[\w+-fallocate\]", ALL, FALLOCATE),
    (
        r"test_seek_hole_and_data\[(front|end|middle|all)\]|test_holes_after_copy_up\[.*\]|test_seek_errors",
        ALL,
        SEEK,
    ),
    (r"test_inode_flags_can_be_asked_for", ALL, IOCTL),
    (r"test_birth_time", ALL, BTIME),
    (r"test_inheritance\[(18|63)-dir\]|test_inheritance\[63-minimal\]", ALL, UMASK),
    (r"test_writing_clears_setuid\[root-(write|append)\]", ALL, KILLPRIV),
    (r"test_root_writes_to_what_has_capabilities", ALL, KILLPRIV),
]

#: layerfs with its upper on a kind of --file-system.
ON: dict[str, list[Row]] = {
    "overlay": [
        (r"test_raw_byte_names", COPIED, "no room for `.wh.` before a name of more than 251 bytes"),
    ],
}


def reason(test: str, system: str, file_system: str | None = None) -> str | None:
    """Why this test is known to fail on this system, or None. `test` is the item's name, parameters
    included; `file_system` what --file-system says."""
    kind, _, _ = system.partition("-")
    if kind == "kernel":
        return _why(KERNEL, test, system)
    if kind == "layerfs" and file_system is not None:
        return _why(ON.get(file_system, []), test, system)
    return None


def without_gate(test: str, system: str) -> str | None:
    """The same for a layerfs mount that has no gate."""
    return _why(NO_GATE, test, system) if system.startswith("layerfs") else None


def _why(rows: list[Row], test: str, system: str) -> str | None:
    _, _, arrangement = system.partition("-")
    bare = test.replace(f"[{system}-", "[").replace(f"[{system}]", "").replace(f"-{system}]", "]")
    for pattern, arrangements, why in rows:
        if arrangement in arrangements and re.fullmatch(pattern, bare):
            return why
    return None
