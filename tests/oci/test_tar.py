"""The tar writer and reader against their laws, against each other, and against a digest made by other
means."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfs.errors import TarError
from layerfs.oci.member import Kind, Member, classify, display, plain_path
from layerfs.oci.streams import COMPRESSIONS
from layerfs.oci.tarreader import parse_records, parse_time
from layerfs.oci.tarwriter import encode_any, encode_header, format_time, xattr_keyword, xattr_name
from tests.oci import members as m


@settings(deadline=None)
@given(st.lists(m.members(), max_size=6), st.sampled_from(COMPRESSIONS))
def test_read_gives_what_was_written(entries: list[tuple[Member, bytes]], compression: str) -> None:
    raw = m.tar_bytes(entries, compression)
    expected = [(member, data) for member, data in entries]
    assert m.read_bytes(raw) == expected
    assert m.tar_bytes(entries, compression) == raw


@given(
    st.builds(
        Member,
        st.one_of(m.paths, st.text("ab/_.", max_size=119).map(lambda text: (text + "c").encode())),
        st.just(Kind.FILE),
        st.integers(0, 0o7777),
        m.ids,
        m.ids,
        m.times,
        st.one_of(st.integers(0, 10**6), st.sampled_from([8**11 - 1, 8**11])),
    )
)
def test_the_short_way_gives_the_same(member: Member) -> None:
    """`encode_header` of files without xattrs."""
    assert encode_header(member) == encode_any(member)


@given(st.binary(min_size=1, max_size=40).filter(lambda raw: b"\0" not in raw))
def test_xattr_keyword_law(name: bytes) -> None:
    keyword = xattr_keyword(name)
    assert b"=" not in keyword
    assert xattr_name(keyword) == name


@given(m.times)
def test_time_law(nanoseconds: int) -> None:
    assert parse_time(format_time(nanoseconds)) == nanoseconds


@given(st.binary(min_size=1, max_size=80).filter(lambda raw: b"\0" not in raw))
def test_displayed_names_are_one_unambiguous_line(name: bytes) -> None:
    shown = display(name)
    assert shown.isprintable() and "\n" not in shown
    forms = r"\\(?:(?P<byte>x..)|(?P<char>u....|U........)|(?P<other>.))"

    def undo(match: re.Match[str]) -> bytes:
        if match["byte"]:
            return bytes((int(match["byte"][1:], 16),))
        if match["char"]:
            return chr(int(match["char"][1:], 16)).encode()
        return {"n": b"\n", "t": b"\t", "r": b"\r", "\\": b"\\"}[match["other"]]

    undone, at = b"", 0
    for match in re.finditer(forms, shown):
        undone += shown[at : match.start()].encode() + undo(match)
        at = match.end()
    assert undone + shown[at:].encode() == name


def ustar(
    name: bytes,
    mode: int,
    uid: int,
    size: int,
    mtime: int,
    flag: bytes,
    link: bytes = b"",
    rdev: tuple[int, int] = (0, 0),
) -> bytes:
    """A header block as POSIX describes it, with nothing of the writer in it."""

    def field(text: bytes, width: int) -> bytes:
        return text + bytes(width - len(text))

    front = field(name, 100) + b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, uid, uid, size, mtime)
    back = flag + field(link, 100) + b"ustar\00000" + bytes(64) + b"%07o\0%07o\0" % rdev + bytes(155 + 12)
    total = sum(front) + 8 * 32 + sum(back)
    return front + b"%06o\0 " % total + back


def test_golden_layer() -> None:
    """A small fixed tree has one DiffID for all time.

    The expected bytes are put together here field by field from POSIX (pax Interchange Format, ustar),
    without the writer, and Python's own tarfile reads them as the members they are meant to be. GOLDEN was
    taken by sha256sum of those bytes."""
    entries = [
        m.directory(b"etc", mtime_ns=1_600_000_000 * 10**9),
        m.file(b"etc/.wh.gone"),
        m.file(
            b"etc/motd",
            b"hello\n",
            uid=1000,
            gid=1000,
            mode=0o640,
            mtime_ns=1_600_000_000_500_000_000,
            xattrs={"user.k": b"v"},
        ),
        m.hardlink(b"etc/motd2", b"etc/motd"),
        m.link(b"etc/mtab", b"../proc/self/mounts"),
        (Member(b"null", Kind.CHAR, 0o666, rdev=(1, 3)), b""),
    ]

    records = b"19 SCHILY.xattr.user.k=v\n".replace(b"19", b"25") + b"22 mtime=1600000000.5\n"
    assert len(b"25 SCHILY.xattr.user.k=v\n") == 25 and len(b"22 mtime=1600000000.5\n") == 22
    second = 1_600_000_000
    expected = b"".join(
        [
            ustar(b"etc/", 0o755, 0, 0, second, b"5"),
            ustar(b"etc/.wh.gone", 0o644, 0, 0, 0, b"0"),
            ustar(b"PaxHeaders.0/motd", 0o644, 0, len(records), second, b"x"),
            records + bytes(512 - len(records)),
            ustar(b"etc/motd", 0o640, 1000, 6, second, b"0"),
            b"hello\n" + bytes(506),
            ustar(b"etc/motd2", 0o644, 0, 0, 0, b"1", b"etc/motd"),
            ustar(b"etc/mtab", 0o777, 0, 0, 0, b"2", b"../proc/self/mounts"),
            ustar(b"null", 0o666, 0, 0, 0, b"3", b"", (1, 3)),
            bytes(1024),
        ]
    )
    assert m.tar_bytes(entries) == expected
    assert hashlib.sha256(expected).hexdigest() == GOLDEN
    with tarfile.open(fileobj=io.BytesIO(expected)) as tar:
        told = [
            (info.name, info.type, info.mode, info.uid, info.size, info.mtime, info.linkname) for info in tar
        ]
        assert tar.getmembers()[2].pax_headers["SCHILY.xattr.user.k"] == "v"
    assert told == [
        ("etc", b"5", 0o755, 0, 0, second, ""),
        ("etc/.wh.gone", b"0", 0o644, 0, 0, 0, ""),
        ("etc/motd", b"0", 0o640, 1000, 6, second + 0.5, ""),
        ("etc/motd2", b"1", 0o644, 0, 0, 0, "etc/motd"),
        ("etc/mtab", b"2", 0o777, 0, 0, 0, "../proc/self/mounts"),
        ("null", b"3", 0o666, 0, 0, 0, ""),
    ]


def test_golden_pax_headers() -> None:
    """The same for what needs a pax header: records in the order of their keys, lengths that count their own
    digits (98 bytes and three digits are 101: there is no 100), names as they are, names of xattrs escaped as
    GNU tar does."""
    long, umlauts = b"d/" + b"n" * 120, "ü".encode() * 45 + b"x"
    entries = [
        m.file(long, b"", uid=8**7, mtime_ns=-1_500_000_000, xattrs={"user.a=b": b"1", "user.%41": b"2\n"}),
        m.link(umlauts, b"t" * 84),
        m.link(b"l", b"t" * 101),
    ]
    first = (
        b"28 SCHILY.xattr.user.%41=2\n\n"
        + b"29 SCHILY.xattr.user.a%3Db=1\n"
        + b"14 mtime=-1.5\n"
        + b"132 path="
        + long
        + b"\n"
        + b"15 uid=2097152\n"
    )
    second = b"101 path=" + umlauts + b"\n"
    third = b"115 linkpath=" + b"t" * 101 + b"\n"
    expected = b"".join(
        [
            ustar(b"PaxHeaders.0/" + b"n" * 80, 0o644, 0, len(first), 0, b"x"),
            first + bytes(512 - len(first)),
            ustar(long[:100], 0o644, 0, 0, 0, b"0"),
            ustar(b"PaxHeaders.0/" + b"_" * 80, 0o644, 0, len(second), 0, b"x"),
            second + bytes(512 - len(second)),
            ustar(b"_" * 90 + b"x", 0o777, 0, 0, 0, b"2", b"t" * 84),
            ustar(b"PaxHeaders.0/l", 0o644, 0, len(third), 0, b"x"),
            third + bytes(512 - len(third)),
            ustar(b"l", 0o777, 0, 0, 0, b"2", b"t" * 100),
            bytes(1024),
        ]
    )
    assert m.tar_bytes(entries) == expected
    with tarfile.open(fileobj=io.BytesIO(expected)) as tar:
        told = [(info.name, info.uid, info.mtime, info.linkname) for info in tar]
    assert told == [
        (long.decode(), 8**7, -1.5, ""),
        (umlauts.decode(), 0, 0, "t" * 84),
        ("l", 0, 0, "t" * 101),
    ]


GOLDEN = "fd8016d6bd6bf69d0a1d15b49e5f58e7df4985fc43a5683e18ae42206629825a"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_reads_what_others_write(form: int) -> None:
    buffer = io.BytesIO()
    long = "d/" * 30 + "x" * 90
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        info = tarfile.TarInfo("./" + long)
        info.size, info.mtime, info.uid, info.mode = 5, 1234567890, 1000, 0o755
        tar.addfile(info, io.BytesIO(b"hello"))
        info = tarfile.TarInfo("dir/")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        info = tarfile.TarInfo("dir/l")
        info.type, info.linkname, info.size = tarfile.LNKTYPE, long[:100], 5
        tar.addfile(info)
    found = m.read_bytes(buffer.getvalue())
    assert [(member.name, member.kind) for member, _ in found] == [
        (long.encode(), Kind.FILE),
        (b"dir", Kind.DIR),
        (b"dir/l", Kind.HARDLINK),
    ]
    member, data = found[0]
    assert (data, member.mtime_ns, member.uid, member.mode) == (b"hello", 1234567890 * 10**9, 1000, 0o755)
    assert found[2][0].target == long[:100].encode()


def test_reads_base_256_and_negative_times() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a")
        info.uid, info.mtime = 2**31, -5
        tar.addfile(info)
    ((member, _),) = m.read_bytes(buffer.getvalue())
    assert (member.uid, member.mtime_ns) == (2**31, -5 * 10**9)


def test_padding_is_read_without_a_note() -> None:
    raw = m.tar_bytes([m.file(b"a", b"x" * 3000)]) + bytes(9 * 512)
    notes: list[str] = []
    assert [(member.name, data) for member, data in m.read_bytes(raw, notes)] == [(b"a", b"x" * 3000)]
    assert not notes
    assert len(m.read_bytes(raw + b"x", notes)) == 1
    assert notes == ["data behind the end mark were ignored"]


def test_global_headers_are_passed_over_with_a_note() -> None:
    body = b"17 path=../../etc\n".replace(b"17", b"18")
    header = encode_header(Member(b"g", Kind.FILE, size=len(body)))
    header = _retyped(header, b"g")
    raw = header + body + bytes(512 - len(body)) + m.tar_bytes([m.file(b"a")])
    notes: list[str] = []
    assert [member.name for member, _ in m.read_bytes(raw, notes)] == [b"a"]
    assert notes == ["a global pax header was ignored"]


def _retyped(header: bytes, flag: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + flag + header[157:512]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


_ONE = m.tar_bytes([m.file(b"a", b"x" * 1000)])


def _with(offset: int, new: bytes, raw: bytes = _ONE) -> bytes:
    """`raw` with other bytes in its first header, the checksum made right again."""
    block = raw[:offset] + new + raw[offset + len(new) : 512]
    blank = block[:148] + b" " * 8 + block[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:] + raw[512:]


def _pax(records: bytes, raw: bytes = _ONE) -> bytes:
    header = _retyped(encode_header(Member(b"p", Kind.FILE, size=len(records))), b"x")
    return header + records + bytes(-len(records) % 512) + raw


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (_ONE[:100], "truncated"),
        (_ONE[:512], "truncated"),
        (_ONE[:1000], "truncated"),
        (_ONE[:1530], "truncated"),
        (_ONE[:1536], "end mark"),
        (b"", "end mark"),
        (b"\1" * 1024, "no tar archive"),
        (_ONE[:148] + b"0000000\0" + _ONE[156:], "checksum"),
        (_with(124, b"\x80" + b"\xff" * 11), "more than any file"),
        (_with(124, b"\xff" * 12), "more than any file"),
        (_with(124, b"77777777777\0"), "truncated"),
        (_with(124, b"12x\0"), "no number"),
        (_with(124, b"12x\0", m.tar_bytes([m.directory(b"d")])), "no number"),
        (_with(124, b"128\0"), "no number"),
        (_with(108, b"\xff" * 8), "owner"),
        (_with(156, b"S"), "sparse"),
        (_with(156, b"M"), "multi-volume"),
        (_with(156, b"Z"), "type that layers do not have"),
        (_with(0, bytes(100)), "no name"),
        (_with(0, b"/etc/../passwd\0"), "'..'"),
        (_with(0, b"a/../../b\0"), "'..'"),
        (_with(0, b".\0"), "root of a layer is a directory"),
        (_pax(b"3 a\n"), "malformed"),
        (_pax(b"99 path=x\n"), "malformed"),
        (_pax(b"0 path=x\n"), "malformed"),
        (_pax(b"10 path=x_"), "malformed"),
        (_pax(b"5 =x\n"), "malformed"),
        (_pax(b"11 size=-1\n"), "no number"),
        (_pax(b"14 mtime=nan\n"), "malformed"),
        (_pax(b"13 mtime=nan\n"), "no time"),
        (_pax(b"30 mtime=99999999999999999999\n"), "no time"),
        (_pax(b"23 mtime=9999999999999\n"), "impossible time"),
        (_pax(b"22 GNU.sparse.major=1\n"), "sparse"),
        (_pax(b"10 path=x\n", _pax(b"10 path=y\n")), "two pax headers"),
        (_pax(b"10 path=x\n", bytes(1024)), "followed by no member"),
        (
            _retyped(encode_header(Member(b"p", Kind.FILE, size=9 << 20)), b"x"),
            "extended header of more than",
        ),
        (_retyped(encode_header(Member(b"p", Kind.FILE, size=400)), b"L") + b"n" * 512 + _ONE, "too long"),
        (gzip.compress(_ONE)[:-9], "gzip"),
        (gzip.compress(_ONE)[:-3], "truncated"),
        (gzip.compress(_ONE)[:40] + b"\0" * 40, "gzip"),
        (gzip.compress(_ONE)[:-8] + struct.pack("<LL", zlib.crc32(b"lie"), len(_ONE)), "damaged"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
        (b"\xfd7zXZ\0" + bytes(100), "xz"),
        (_ONE + bytes(17 << 20), "behind its end mark"),
        (gzip.compress(_ONE + bytes(17 << 20)), "behind its end mark"),
    ],
)
def test_damaged_archives_are_refused_in_one_line(raw: bytes, says: str) -> None:
    with pytest.raises(TarError) as caught:
        m.read_bytes(raw)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.binary(max_size=3000))
def test_noise_is_refused_or_read(noise: bytes) -> None:
    try:
        m.read_bytes(noise)
    except TarError:
        pass


@settings(deadline=None)
@given(st.lists(m.members(), min_size=1, max_size=3), st.data())
def test_damage_anywhere_is_refused_or_read(entries: list[tuple[Member, bytes]], data: st.DataObject) -> None:
    raw = bytearray(m.tar_bytes(entries))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for piece in (bytes(raw), bytes(raw[:cut])):
        try:
            m.read_bytes(piece)
        except TarError as error:
            assert "\n" not in str(error)


@given(st.binary(max_size=200))
def test_records_never_raise_anything_else(body: bytes) -> None:
    try:
        parse_records(body)
    except TarError:
        pass


def test_plain_paths() -> None:
    assert plain_path(b"./a//b/./c/") == plain_path(b"//a/b/c") == b"a/b/c"
    assert plain_path(b"./") == plain_path(b"/") == plain_path(b".") == b""
    for bad in (b"", b"/..", b"..", b"a/..", b"../a", b"a/../b", b"a\0b", b"n" * 256, b"a/" * 2050):
        with pytest.raises(TarError):
            plain_path(bad)
    # A whiteout's prefix comes on top of the longest name there is.
    assert plain_path(b".wh." + b"n" * 255)


def test_bare_whiteouts() -> None:
    for bad in (b".wh.", b".wh..", b".wh..."):
        with pytest.raises(TarError):
            classify(bad)


@pytest.mark.skipif(not shutil.which("tar"), reason="needs GNU tar")
def test_gnu_tar_lists_the_same(tmp_path: object) -> None:
    entries = [
        m.directory(b"d"),
        m.file(b"d/" + "ü".encode() * 90, b"1"),
        m.file(b"d/\xff\xfe raw", b"22"),
        m.file(b"d/" + b"\xff" * 150, b"333"),
        m.file(b"d/new\nline", b"4444", mtime_ns=1_234_567_890_123_456_789),
        m.link(b"d/l", b"t" * 150),
    ]
    path = m.layer_file(f"{tmp_path}/l.tar", entries)
    listed = subprocess.run(
        ["tar", "--quoting-style=literal", "--full-time", "-tf", path],
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert listed.stderr == b""
    assert listed.stdout == b"".join(
        member.name + (b"/" if member.kind is Kind.DIR else b"") + b"\n" for member, _ in entries
    )
