"""`overlay.redirect` as an author may have written it: a plain sibling, a plain absolute path, or EIO."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfs.overlay import redirect

components = st.binary(min_size=1, max_size=20).filter(
    lambda part: part not in (b".", b"..") and not {0, 47} & set(part)
)


@given(st.lists(components, min_size=1, max_size=8))
def test_what_we_write_is_read_back(parts: list[bytes]) -> None:
    path = b"/".join(parts)
    assert redirect.decode(redirect.encode(path)) == b"/" + path


@given(components)
def test_a_sibling(name: bytes) -> None:
    assert redirect.decode(name) == name


@given(components)
def test_a_closing_nul_is_no_part_of_it(name: bytes) -> None:
    assert redirect.decode(name + b"\0") == name


NONSENSE = {
    "empty": b"",
    "only NUL": b"\0",
    "root": b"/",
    "dot": b".",
    "dotdot": b"..",
    "/dotdot": b"/..",
    "/dot": b"/.",
    "climbs": b"/a/../b",
    "climbs at the end": b"/a/..",
    "climbs at the start": b"/../../etc/passwd",
    "relative path": b"a/b",
    "relative climbing": b"../x",
    "relative, slash at the end": b"a/",
    "double slash": b"//a",
    "double slash inside": b"/a//b",
    "slash at the end": b"/a/",
    "dot inside": b"/a/./b",
    "NUL inside": b"a\0b",
    "NUL inside a path": b"/a\0/b",
    "NUL first": b"\0/a",
    "long component": b"a" * 256,
    "long component in a path": b"/a/" + b"b" * 256,
    "longer than a path": b"/" + b"a/" * 2048 + b"a",
    "64 KiB": b"/a" * (32 << 10),
    "64 KiB of one name": b"x" * (64 << 10),
}


@pytest.mark.parametrize("value", NONSENSE.values(), ids=NONSENSE)
def test_nonsense(value: bytes) -> None:
    with pytest.raises(OSError) as caught:
        redirect.decode(value)
    assert caught.value.errno == errno.EIO


@given(st.binary(max_size=64))
def test_whatever_it_says_it_names_something_inside(value: bytes) -> None:
    try:
        path = redirect.decode(value)
    except OSError as error:
        assert error.errno == errno.EIO
        return
    parts = path[1:].split(b"/") if path.startswith(b"/") else [path]
    assert all(
        part and part not in (b".", b"..") and b"/" not in part and b"\0" not in part for part in parts
    )
