"""Which xattr names a user sees, and where a user's own are kept: the two are inverse, and no user reaches a
mark of ours.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layerfs.overlay.names import FOREIGN, TRUSTED, USER, XattrNames, shown, stored

_PARTS = (
    "trusted.",
    "user.",
    "overlay.",
    "security.",
    "opaque",
    "fuseoverlayfs.",
    "containers.override_stat",
    "x",
    "",
)
names = st.lists(st.sampled_from(_PARTS), max_size=6).map("".join) | st.text(max_size=30)

MARKS = [value for prefix in (TRUSTED, USER) for value in vars(XattrNames(prefix)).values()]


@given(names)
@example("trusted.overlay.opaque")
@example("trusted.overlay.overlay.opaque")
@example("user.overlay.")
def test_what_a_user_sets_is_what_a_user_sees(name: str) -> None:
    kept = stored(name)
    if kept is not None:
        assert shown(kept) == name


@given(names)
def test_what_is_shown_is_kept_where_it_was(on_disk: str) -> None:
    name = shown(on_disk)
    if name is not None:
        assert stored(name) == on_disk


@given(names)
def test_no_user_reaches_a_mark(name: str) -> None:
    assert stored(name) not in MARKS


@given(names, names)
def test_two_names_stay_two(one: str, two: str) -> None:
    if one != two and stored(one) is not None:
        assert stored(one) != stored(two)


@pytest.mark.parametrize(
    "mark", [*MARKS, *FOREIGN, "user.fuseoverlayfs.opaque", "user.containers.override_stat"]
)
def test_marks_are_hidden(mark: str) -> None:
    assert shown(mark) is None


@pytest.mark.parametrize(
    "name", ["user.a", "trusted.a", "security.capability", "system.posix_acl_access", "user.overlays"]
)
def test_others_are_as_they_are(name: str) -> None:
    assert (shown(name), stored(name)) == (name, name)


def test_one_level_of_escape() -> None:
    assert stored("trusted.overlay.opaque") == "trusted.overlay.overlay.opaque"
    assert stored("trusted.overlay.overlay.opaque") == "trusted.overlay.overlay.overlay.opaque"
    assert shown("user.overlay.overlay.overlay.x") == "user.overlay.overlay.x"


@pytest.mark.parametrize("name", [*FOREIGN, "user.fuseoverlayfs.anything"])
def test_marks_of_others_cannot_be_set(name: str) -> None:
    assert stored(name) is None
