"""The grammar of mount options: tables, and the law that what is escaped comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfs.errors import UsageError
from layerfs.overlay.options import (
    FUSE_OVERLAYFS,
    Verdict,
    escape,
    format_lowerdir,
    kernel_mount_options,
    parse_lowerdir,
    parse_options,
    split_options,
    unescape,
)

paths = st.text(alphabet=st.sampled_from(':,\\"=\n +ab/.é\udcff'), min_size=1, max_size=12)


@given(st.lists(paths, min_size=1, max_size=6))
def test_lowers_come_back(lowers: list[str]) -> None:
    assert parse_lowerdir(format_lowerdir(lowers)) == lowers


@given(st.lists(paths, min_size=1, max_size=4), paths, paths)
def test_a_whole_option_string_comes_back(lowers: list[str], upper: str, work: str) -> None:
    text = (
        f"noatime,lowerdir={format_lowerdir(lowers)},upperdir={escape(upper)},workdir={escape(work)},volatile"
    )
    parsed = parse_options([text])
    assert (parsed.lowers, parsed.upper, parsed.work) == (tuple(lowers), upper, work)
    assert parsed.volatile and parsed.fuse == ("noatime",) and not parsed.unknown


@given(st.text(alphabet=st.sampled_from(':,\\"=abc'), max_size=30))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        parse_options([text])
    except UsageError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "lowers"),
    [
        ("/a", ["/a"]),
        ("/a:/b", ["/a", "/b"]),
        (r"/a\:b:/c", ["/a:b", "/c"]),
        (r"/a\,b", ["/a,b"]),
        (r"/a\\:/b", ["/a\\", "/b"]),
        (r"/a\x", ["/ax"]),  # the kernel drops the backslash before any character
        ("l/ABC:l/DEF", ["l/ABC", "l/DEF"]),
        ("/with\nnewline:/b", ["/with\nnewline", "/b"]),
        ("/a\\", ["/a\\"]),
    ],
)
def test_lowerdir(text: str, lowers: list[str]) -> None:
    assert parse_lowerdir(text) == lowers


@pytest.mark.parametrize("text", ["", ":/a", "/a:", "/a::/b", ":"])
def test_lowerdir_with_an_empty_layer_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_options([f"lowerdir={text}"])


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", []),
        (",,", []),
        ("a,b", ["a", "b"]),
        (r"a\,b,c", [r"a\,b", "c"]),
        ('context="u:r:t:s0:c1,c2",x', ['context="u:r:t:s0:c1,c2"', "x"]),
        ('x,context="a,b"', ["x", 'context="a,b"']),
        ("context=u:r:t:s0,x", ["context=u:r:t:s0", "x"]),
        ('upperdir=/a"b,c"', ['upperdir=/a"b', 'c"']),  # a path may hold quotes
    ],
)
def test_split(text: str, options: list[str]) -> None:
    assert split_options(text) == options


@pytest.mark.parametrize("text", ['context="a', 'context="a"b'])
def test_bad_quotes_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        split_options(text)


def test_what_podman_says() -> None:
    parsed = parse_options(
        [
            "lowerdir=/s/l/ABC:/s/l/DEF,upperdir=/s/o/1/diff,workdir=/s/o/1/work,volatile,"
            'context="system_u:object_r:container_file_t:s0:c1,c2",fsync=0,bogus=1,noacl,nodev'
        ]
    )
    assert parsed.lowers == ("/s/l/ABC", "/s/l/DEF")
    assert (parsed.upper, parsed.work, parsed.volatile) == ("/s/o/1/diff", "/s/o/1/work", True)
    assert parsed.unknown == ("bogus=1",) and parsed.ineffective == ("fsync=0",) and not parsed.acl
    assert parsed.fuse == ('context="system_u:object_r:container_file_t:s0:c1,c2"', "nodev")


@pytest.mark.parametrize(
    "text",
    [
        "lowerdir",
        "lowerdir=",
        "upperdir=",
        "workdir",
        "redirect_dir=maybe",
        "redirect_dir",
        "metacopy=1",
        "xattr_permissions=3",
        "xattr_permissions=user",
        "noxattrs=yes",
        "threaded=",
        "plugins=/usr/lib/plugin.so",
        "verity=require",
        "gate=off,data=passthrough",
        "gate=off,data=cached",
        "gate=on,data=python",
        "gate=1",
        "max_names",
        "max_names=0",
        "max_names=-1",
        "max_names=many",
        "datadir+=/a",
        "remount",
    ],
)
def test_known_but_wrong_or_impossible(text: str) -> None:
    with pytest.raises(UsageError):
        parse_options([text])


@pytest.mark.parametrize(
    "text", ["volatile=1", "userxattr=on", "ro=1", "nodev=1", "max_read=", "plainly wrong"]
)
def test_unknown(text: str) -> None:
    assert parse_options([text]).unknown == (text,)


@pytest.mark.parametrize(
    "text",
    [
        "defaults",
        "x-systemd.automount",
        "_netdev",
        "nofail",
        "index=on",
        "xino=auto",
        "nfs_export=off",
        "uuid=null",
        "xattr_permissions=0",
        "verity=off",
        "rw",
    ],
)
def test_without_effect(text: str) -> None:
    assert parse_options([text]) == parse_options([])


@pytest.mark.parametrize("name", FUSE_OVERLAYFS)
def test_each_option_of_fuse_overlayfs_does_what_the_table_says(name: str) -> None:
    decision = FUSE_OVERLAYFS[name]
    option = name if decision.value is None else f"{name}=1"
    if decision.verdict is Verdict.REFUSED:
        with pytest.raises(UsageError):
            parse_options([option])
        return
    parsed = parse_options([option])
    assert parsed.ineffective == ((option,) if decision.verdict is Verdict.IGNORED else ())
    assert parsed.unknown == ((option,) if decision.verdict is Verdict.NOTED else ())
    plain = replace(parsed, ineffective=(), unknown=()) == parse_options([])
    assert plain == (decision.verdict is not Verdict.HONOURED)


def test_an_option_of_fuse_overlayfs_in_a_form_that_it_does_not_have() -> None:
    for option in ("noacl=1", "static_nlink=1", "noxattrs", "timeout"):
        assert parse_options([option]).unknown == (option,)


def test_max_names() -> None:
    assert parse_options(["max_names=20000"]).max_names == 20000
    assert parse_options([""]).max_names is None


def test_the_later_wins() -> None:
    parsed = parse_options(["ro,redirect_dir=on,lowerdir=/a,nodev", "rw,redirect_dir=off,lowerdir=/b:/c,dev"])
    assert not parsed.read_only and parsed.redirect_dir is False
    assert parsed.lowers == ("/b", "/c") and parsed.fuse == ("dev",)


def test_lowerdir_plus_takes_one_path_as_it_is() -> None:
    assert parse_options(["lowerdir+=/a:b,lowerdir+=/c"]).lowers == ("/a:b", "/c")


# --- what the mount gets --------------------------------------------------------------------------


def options_for(text: str, **how: object) -> set[str]:
    chosen, notes = kernel_mount_options(parse_options([text]), **{"root": True, "read_only": False} | how)  # type: ignore[arg-type]
    assert not notes
    return set(chosen)


NAMED = {"fsname=layerfs", "subtype=layerfs"}


def test_defaults() -> None:
    assert options_for("") == NAMED | {"default_permissions", "allow_other", "suid", "dev", "noatime"}
    assert options_for("", root=False) == NAMED | {"default_permissions", "noatime"}
    assert "ro" in options_for("", read_only=True)


@pytest.mark.parametrize(
    ("text", "there", "gone"),
    [
        ("nosuid,nodev", {"nosuid", "nodev"}, {"suid", "dev"}),
        ("atime", set(), {"noatime", "atime"}),
        ("relatime", set(), {"noatime", "relatime"}),
        ("noatime,relatime", set(), {"noatime"}),
        ("relatime,noatime", {"noatime"}, set()),
        ("allow_root", {"allow_root"}, {"allow_other"}),
        ("noexec,sync", {"noexec", "sync"}, {"exec", "async"}),
        ("max_read=65536", {"max_read=65536"}, set()),
    ],
)
def test_explicit_options_beat_defaults(text: str, there: set[str], gone: set[str]) -> None:
    chosen = options_for(text)
    assert there <= chosen and not gone & chosen


def test_an_ordinary_user_is_told_what_only_root_may() -> None:
    chosen, notes = kernel_mount_options(parse_options(["suid,dev"]), root=False, read_only=False)
    assert not {"suid", "dev"} & chosen and len(notes) == 2


def test_source_is_escaped_for_libfuse() -> None:
    assert r"fsname=a\,b\\c" in options_for("", source="a,b\\c")


def test_unescape_is_kernel_like() -> None:
    assert unescape(r"a\bc\\\:") == "abc\\:"


def test_labels_go_to_kernels_that_know_them() -> None:
    text = 'context="u:r:t:s0:c1,c2"'
    assert r'context="u:r:t:s0:c1\,c2"' in options_for(text, labels=True)
    assert not any(option.startswith("context") for option in options_for(text))


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("", None),
        ("gate=on", True),
        ("gate=off", False),
        ("data=python", False),
        ("data=cached,gate=on", True),
    ],
)
def test_the_gate(text: str, gate: bool | None) -> None:
    assert parse_options([text]).gate is gate
