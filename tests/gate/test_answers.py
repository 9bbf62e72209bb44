"""Each row of gate/PROTOCOL.md, by hand-made frames: the core and its twin say the same, and it is this."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gate import frames as f
from tests.gate.pair import LISTS_ROOT, ROOT, Pair, make_socket, sync_files
from tests.gate.twin import KEEPS_SETID, NATIVE, READ_MAX, WRITE_MAX, Answer, Home, Plain, Verdict
from tests.support import mounts

BODY = f.OUT_HEADER.size


@pytest.fixture
def tree(pair: Pair) -> Pair:
    """The root with a name of each kind, published."""
    return lay_out(pair)


def lay_out(pair: Pair) -> Pair:
    top = pair.layers[0]
    (top / "file").write_text("some text")
    (top / "other").write_bytes(bytes(5000))
    (top / "link").symlink_to("file")
    os.mkfifo(top / "pipe")
    make_socket(top / "socket")
    (top / "twice").write_text("hard-linked")
    os.link(top / "twice", top / "again")
    (top / "marked").write_text("has an xattr")
    os.setxattr(top / "marked", "user.mark", b"1")
    (top / "directory").mkdir()
    (top / "asked").write_text("Python's")
    sync_files(top)
    pair.publish(asked=(b"asked",))
    return pair


def passed(answer: Answer) -> bool:
    return answer.verdict is Verdict.PASSED and not answer.replies and not answer.let_go


def error(answer: Answer) -> int:
    assert answer.verdict is Verdict.ANSWERED and len(answer.replies) == 1
    size, negative, _ = f.OUT_HEADER.unpack_from(answer.replies[0])
    assert size == len(answer.replies[0])
    return -int(negative)


def payload(answer: Answer) -> bytes:
    assert error(answer) == 0
    return answer.replies[0][BODY:]


def look_up(pair: Pair, name: str, directory: int = ROOT) -> int:
    """The node that the kernel gets."""
    (node,) = struct.unpack_from("<Q", payload(pair.feed(f.lookup(directory, name.encode()))))
    return int(node)


def open_file(pair: Pair, name: str) -> tuple[int, int]:
    """(node, handle)"""
    node = look_up(pair, name)
    handle, flags, _ = f.OPEN_OUT.unpack(payload(pair.feed(f.open(node))))
    assert handle & NATIVE and flags == f.FOPEN_KEEP_CACHE
    return node, handle


# -- LOOKUP, FORGET, BATCH_FORGET ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "link", "pipe", "socket", "marked", "directory"])
def test_lookup_of_a_plain_name(tree: Pair, name: str) -> None:
    answer = payload(tree.feed(f.lookup(ROOT, name.encode())))
    assert answer == f.entry(os.lstat(tree.layers[0] / name), tree.node(name))
    assert tree.core.known(tree.node(name)) == (1, ROOT)
    look_up(tree, name)
    assert tree.core.known(tree.node(name)) == (2, ROOT)


def test_lookup_of_an_absent_name_is_answered_for_ever(tree: Pair) -> None:
    assert payload(tree.feed(f.lookup(ROOT, b"absent"))) == f.ABSENT
    assert tree.core.counts().known == 0


@pytest.mark.parametrize("name", ["asked", "twice", ".", ".."])
def test_lookup_that_python_answers(tree: Pair, name: str) -> None:
    """Names that are not plain, hard-linked files, and what no file system here is asked for."""
    assert passed(tree.feed(f.lookup(ROOT, name.encode())))
    assert tree.core.counts().known == 0


def test_lookup_in_a_directory_that_is_not_published(tree: Pair) -> None:
    assert passed(tree.feed(f.lookup(99, b"file")))


def test_lookup_of_long_names(tree: Pair) -> None:
    assert payload(tree.feed(f.lookup(ROOT, b"n" * 255))) == f.ABSENT
    assert passed(tree.feed(f.lookup(ROOT, b"n" * 256)))  # ENAMETOOLONG is Python's to say


def test_a_file_that_was_replaced_outside_is_python_s(tree: Pair) -> None:
    node = look_up(tree, "file")
    new = tree.layers[0] / "new"
    new.write_text("another")
    new.rename(tree.layers[0] / "file")
    assert passed(tree.feed(f.lookup(ROOT, b"file")))
    assert passed(tree.feed(f.getattr(node)))
    assert passed(tree.feed(f.open(node)))


def test_a_file_that_vanished_outside_is_python_s(tree: Pair) -> None:
    node = look_up(tree, "file")
    (tree.layers[0] / "file").unlink()
    assert passed(tree.feed(f.lookup(ROOT, b"file")))
    assert passed(tree.feed(f.getattr(node)))


def test_a_home_behind_a_symbolic_link_is_not_entered(tree: Pair) -> None:
    """A directory replaced outside by a link: no way through it may lead out of the layer."""
    top = tree.layers[0]
    (top / "directory" / "below").write_text("b")
    tree.publish(100, path="directory")
    node = look_up(tree, "below", 100)
    (top / "directory").rename(top / "moved")
    tree.publish_names(101, [Home(0, b"directory", 1 << 48)], {b"below": Plain(0, node & (1 << 48) - 1)})
    (top / "directory").symlink_to("moved")
    assert passed(tree.feed(f.lookup(101, b"below")))


def test_forget(tree: Pair) -> None:
    node = look_up(tree, "file")
    look_up(tree, "file")
    answer = tree.feed(f.forget(node, 1))
    assert (answer.verdict, answer.replies) == (Verdict.ANSWERED, [])
    assert tree.core.known(node) == (1, ROOT)
    tree.feed(f.forget(node, 1))
    assert tree.core.counts().known == 0
    assert passed(tree.feed(f.forget(node, 1)))  # it is Python's, if anybody's


def test_batch_forget_is_shortened_to_what_python_knows(tree: Pair) -> None:
    ours = look_up(tree, "file")
    answer = tree.feed(f.batch_forget((77, 1), (ours, 1), (78, 2)))
    assert answer.verdict is Verdict.PASSED
    assert answer.frame == f.batch_forget((77, 1), (78, 2))
    assert tree.core.counts().known == 0


def test_batch_forget_of_known_objects_alone_is_answered(tree: Pair) -> None:
    nodes = [look_up(tree, name) for name in ("file", "link", "other")]
    answer = tree.feed(f.batch_forget(*((node, 1) for node in nodes)))
    assert (answer.verdict, answer.replies) == (Verdict.ANSWERED, [])
    assert tree.core.counts().known == 0


def test_batch_forget_that_lies_about_its_length(tree: Pair) -> None:
    node = look_up(tree, "file")
    frame = bytearray(f.batch_forget((node, 1)))
    struct.pack_into("<I", frame, f.IN_HEADER.size, 2)
    assert passed(tree.feed(bytes(frame)))
    assert tree.core.known(node) == (1, ROOT)


def test_a_directory_is_let_go_of_with_its_last_object(tree: Pair) -> None:
    first, second = look_up(tree, "file"), look_up(tree, "link")
    assert tree.holds(ROOT)
    assert tree.feed(f.forget(first, 1)).let_go == []
    assert tree.feed(f.batch_forget((second, 1))).let_go == [ROOT]
    assert not tree.holds(ROOT)


# -- what Python takes over ----------------------------------------------------------------------------


def test_an_adopted_name_is_python_s(tree: Pair) -> None:
    node = look_up(tree, "file")
    look_up(tree, "file")
    assert tree.adopt(ROOT, b"file") == 2
    for frame in (f.lookup(ROOT, b"file"), f.getattr(node), f.open(node), f.forget(node, 1)):
        assert passed(tree.feed(frame))
    tree.give_back(ROOT, b"file")
    assert look_up(tree, "file") == node


def test_a_name_that_was_never_plain_is_not_given_back(tree: Pair) -> None:
    tree.give_back(ROOT, b"asked")
    assert passed(tree.feed(f.lookup(ROOT, b"asked")))


@pytest.mark.parametrize("real", [0, 1, 1 << 48, (1 << 64) - 1])
def test_a_number_that_does_not_fit_is_python_s(tree: Pair, real: int) -> None:
    """1 is the root's node, and beyond 2^48 is the number of the layer."""
    tree.publish_names(50, [tree.home()], {b"file": Plain(0, real)})
    assert passed(tree.feed(f.lookup(50, b"file")))
    tree.give_back(50, b"file")
    assert passed(tree.feed(f.lookup(50, b"file")))


def test_a_retracted_name_is_python_s(tree: Pair) -> None:
    tree.retract(ROOT, b"file")
    tree.retract(ROOT, b"new")
    assert passed(tree.feed(f.lookup(ROOT, b"file")))
    assert passed(tree.feed(f.lookup(ROOT, b"new")))
    assert payload(tree.feed(f.lookup(ROOT, b"newer"))) == f.ABSENT


def test_a_node_that_python_has_is_not_made_a_second_time(tree: Pair) -> None:
    node = tree.node("file")
    tree.claim(node)
    assert passed(tree.feed(f.lookup(ROOT, b"file")))
    tree.unclaim(node)
    assert look_up(tree, "file") == node


def test_one_object_under_two_names_is_answered_under_one(tree: Pair) -> None:
    tree.publish_names(60, [tree.home()], {b"file": Plain(0, tree.node("file") & (1 << 48) - 1)})
    look_up(tree, "file")
    assert passed(tree.feed(f.lookup(60, b"file")))


def test_a_reply_that_nobody_waits_for_counts_nothing(tree: Pair) -> None:
    tree.list_names(LISTS_ROOT, ROOT, [b"file", b"link"])
    node = look_up(tree, "other")
    assert tree.holds(ROOT)
    tree.plug(False)
    tree.feed(f.lookup(ROOT, b"file"))
    tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 0))
    tree.feed(f.open(node))
    tree.plug(True)
    tree.agree()
    assert set(tree.twin.known) == {node}
    tree.feed(f.forget(node, 1))
    # The directory goes with an object of which the kernel has not heard, too.
    tree.plug(False)
    assert tree.feed(f.lookup(ROOT, b"file")).let_go == [ROOT]


# -- GETATTR, READLINK, GETXATTR, LISTXATTR, STATFS ----------------------------------------------------


def test_getattr(tree: Pair) -> None:
    node = look_up(tree, "other")
    answer = payload(tree.feed(f.getattr(node)))
    assert answer == f.ATTR_OUT.pack(f.FOR_EVER, 0, 0) + f.attributes(
        os.lstat(tree.layers[0] / "other"), node
    )


def test_getattr_of_python_s_nodes(tree: Pair) -> None:
    assert passed(tree.feed(f.getattr(ROOT)))
    assert passed(tree.feed(f.getattr(tree.node("file"))))  # the kernel has not got it from here


def test_readlink(tree: Pair) -> None:
    assert payload(tree.feed(f.frame(f.READLINK, look_up(tree, "link")))) == b"file"
    assert passed(tree.feed(f.frame(f.READLINK, look_up(tree, "file"))))
    assert passed(tree.feed(f.frame(f.READLINK, ROOT)))


def test_an_object_without_xattrs(tree: Pair) -> None:
    for name in ("file", "link", "pipe"):
        node = look_up(tree, name)
        assert error(tree.feed(f.getxattr(node, b"user.mark"))) == errno.ENODATA
        assert payload(tree.feed(f.listxattr(node))) == f.GETXATTR_OUT.pack(0, 0)
        assert payload(tree.feed(f.listxattr(node, 100))) == b""


def test_an_object_with_xattrs_is_python_s(tree: Pair) -> None:
    node = look_up(tree, "marked")
    assert passed(tree.feed(f.getxattr(node, b"user.mark")))
    assert passed(tree.feed(f.getxattr(node, b"user.other")))
    assert passed(tree.feed(f.listxattr(node)))


def test_xattrs_where_users_see_none(make_pair: Callable[..., Pair]) -> None:
    pair = lay_out(make_pair(xattrs=False))
    node = look_up(pair, "file")
    assert passed(pair.feed(f.getxattr(node, b"user.mark")))
    assert passed(pair.feed(f.listxattr(node)))


def test_statfs(tree: Pair, make_pair: Callable[..., Pair]) -> None:
    st = os.statvfs("/proc")
    assert f.STATFS_OUT.unpack(payload(tree.feed(f.frame(f.STATFS, ROOT))))[5:7] == (st.f_bsize, 255)
    assert passed(make_pair(statfs=None).feed(f.frame(f.STATFS, ROOT)))


def test_attributes_that_python_told(tree: Pair) -> None:
    path = tree.layers[0] / "directory"
    tree.tell_attributes(ROOT, str(path))
    answer = payload(tree.feed(f.getattr(ROOT)))
    assert answer == f.ATTR_OUT.pack(f.FOR_EVER, 0, 0) + f.attributes(os.lstat(path), ROOT)
    tree.untell(ROOT)
    assert passed(tree.feed(f.getattr(ROOT)))


def test_a_capability_that_is_not_there(tree: Pair) -> None:
    tree.tell_no_capability(77)
    assert error(tree.feed(f.getxattr(77, b"security.capability"))) == errno.ENODATA
    for name in (b"security.capability2", b"security.cap", b"user.mark"):
        assert passed(tree.feed(f.getxattr(77, name)))
    assert passed(tree.feed(f.listxattr(77)))
    assert passed(tree.feed(f.getxattr(78, b"security.capability")))
    tree.untell(77)
    assert passed(tree.feed(f.getxattr(77, b"security.capability")))


def test_a_directory_with_xattrs_is_python_s(tree: Pair) -> None:
    """A mark may say that it is opaque, or lies elsewhere."""
    os.setxattr(tree.layers[0] / "directory", "user.mark", b"1")
    assert passed(tree.feed(f.lookup(ROOT, b"directory")))


# -- OPENDIR ----------------------------------------------------------------------------------------------


def test_python_is_called_where_it_can_answer_at_once(tree: Pair) -> None:
    opendir = f.frame(f.OPENDIR, ROOT, f.OPEN_IN.pack(0, 0))
    assert passed(tree.feed(opendir))
    tree.takes_calls()
    first, second = (f.OPEN_OUT.unpack(payload(tree.feed(opendir)))[0] for _ in range(2))
    assert first and second and tree.core.open_directories() == {first, second}
    assert passed(tree.feed(f.frame(f.OPENDIR, 77, f.OPEN_IN.pack(0, 0))))  # it says that it cannot
    tree.list_names(first, ROOT, [b"file"])
    assert payload(tree.feed(f.release(ROOT, first, f.RELEASEDIR))) == b""
    assert tree.core.open_directories() == {second}
    assert passed(tree.feed(f.readdirplus(ROOT, first, 0)))
    tree.plug(False)  # nobody learns of the handle
    tree.feed(opendir)
    tree.plug(True)
    assert tree.core.open_directories() == {second}
    tree.agree()


# -- READDIRPLUS, RELEASEDIR ---------------------------------------------------------------------------


def test_readdirplus_up_to_the_first_name_that_is_python_s(tree: Pair) -> None:
    tree.list_names(LISTS_ROOT, ROOT, [b"file", b"link", b"other"], parent=33)
    tree.adopt(ROOT, b"link")
    listed = payload(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 0)))
    assert f.names_of(listed) == [b".", b"..", b"file"]
    assert listed.startswith(f.listed(b".", ROOT, 1, stat.S_IFDIR) + f.listed(b"..", 33, 2, stat.S_IFDIR))
    assert set(tree.twin.known) == {tree.node("file")}
    assert passed(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, tree.offset(b"file"))))
    behind = tree.feed(f.readdirplus(ROOT, LISTS_ROOT, tree.offset(b"link")))
    assert f.names_of(payload(behind)) == [b"other"]
    assert payload(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, tree.offset(b"other")))) == b""
    tree.agree()


def test_names_that_are_not_plain_come_first(tree: Pair) -> None:
    tree.retract(ROOT, b"new")
    tree.list_names(LISTS_ROOT, ROOT, [b"file", b"asked", b"new"])
    assert f.names_of(payload(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 0)))) == [b".", b".."]
    for offset in (2, tree.offset(b"new")):
        assert passed(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, offset)))
    behind = tree.feed(f.readdirplus(ROOT, LISTS_ROOT, tree.offset(b"asked")))
    assert f.names_of(payload(behind)) == [b"file"]


def test_offsets_last_while_names_come_and_go(tree: Pair) -> None:
    """The kernel goes on in a listing that another opener made, and asks this one's handle for the rest."""
    tree.list_names(LISTS_ROOT, ROOT, [b"file", b"link", b"other"])
    offsets = [tree.offset(name) for name in (b"file", b"link", b"other")]
    for name in (b"new", b"file"):
        tree.adopt(ROOT, name)
        tree.retract(ROOT, name)
    for handle in (LISTS_ROOT, 6):
        tree.list_names(handle, ROOT, [b"link", b"new", b"other"])
    assert offsets == [tree.offset(name) for name in (b"file", b"link", b"other")]
    for handle in (LISTS_ROOT, 6):
        behind = tree.feed(f.readdirplus(ROOT, handle, offsets[0]))
        assert f.names_of(payload(behind)) == [b"link", b"other"]


def test_readdirplus_gives_as_many_names_as_fit(tree: Pair) -> None:
    names = [b"file", b"link", b"other", b"pipe"]
    tree.list_names(LISTS_ROOT, ROOT, names)
    seen: list[bytes] = []
    offset = 0
    while listed := f.names_of(payload(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, offset, 400)))):
        assert len(listed) == 2
        seen += listed
        offset = tree.offset(listed[-1]) if offset else 2
    assert seen == [b".", b"..", *names]


def test_a_rewind_asks_python_every_time(tree: Pair) -> None:
    """Python looks again, and lists what it found, while it answers the rewound request itself."""
    tree.list_names(LISTS_ROOT, ROOT, [b"file"])
    assert f.names_of(payload(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 0)))) == [b".", b"..", b"file"]
    for _ in range(3):
        assert passed(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 0)))
        tree.list_names(LISTS_ROOT, ROOT, [b"file", b"link"])
        assert f.names_of(payload(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 2)))) == [b"file", b"link"]


def test_a_name_that_has_vanished(tree: Pair) -> None:
    """Absent until it comes again; listings pass it over."""
    tree.list_names(LISTS_ROOT, ROOT, [b"file", b"link", b"other"])
    tree.adopt(ROOT, b"link")
    tree.vanish(ROOT, b"link")
    assert payload(tree.feed(f.lookup(ROOT, b"link"))) == f.ABSENT
    listed = f.names_of(payload(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 0))))
    assert listed == [b".", b"..", b"file", b"other"]
    tree.retract(ROOT, b"link")
    assert passed(tree.feed(f.lookup(ROOT, b"link")))


def test_a_listing_begins_with_what_is_there_when_it_is_read(tree: Pair) -> None:
    """Not with what was there at OPENDIR: the kernel keeps it as the state of when it began to read."""
    tree.list_names(LISTS_ROOT, ROOT, [b"file", b"link"])
    tree.retract(ROOT, b"new")
    assert passed(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 0)))


def test_a_listing_goes_on_with_what_is_there_when_it_is_read(tree: Pair) -> None:
    """The kernel adds each part to what it keeps for all openers: Python looks again."""
    tree.list_names(LISTS_ROOT, ROOT, [b"file", b"link", b"other"])
    assert f.names_of(payload(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 0, 500)))) == [b".", b"..", b"file"]
    tree.adopt(ROOT, b"link")
    tree.retract(ROOT, b"link")
    assert passed(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, tree.offset(b"file"))))
    tree.list_names(LISTS_ROOT, ROOT, [b"file", b"other"])
    behind = tree.feed(f.readdirplus(ROOT, LISTS_ROOT, tree.offset(b"link")))
    assert f.names_of(payload(behind)) == [b"other"]


def test_readdirplus_of_a_handle_that_lists_nothing_here(tree: Pair) -> None:
    assert passed(tree.feed(f.readdirplus(ROOT, 6, 0)))
    assert passed(tree.feed(f.readdirplus(ROOT, 0, 0)))


def test_releasedir_is_python_s_too(tree: Pair) -> None:
    tree.list_names(LISTS_ROOT, ROOT, [b"file"])
    for handle in (LISTS_ROOT, 6, 0):
        assert passed(tree.feed(f.release(ROOT, handle, f.RELEASEDIR)))
    assert tree.core.counts().listings == 0
    assert passed(tree.feed(f.readdirplus(ROOT, LISTS_ROOT, 0)))


# -- OPEN, READ, LSEEK, FLUSH, FSYNC, RELEASE ----------------------------------------------------------


def test_open_and_read(tree: Pair) -> None:
    node, handle = open_file(tree, "file")
    assert payload(tree.feed(f.read(node, handle, 0, 4096))) == b"some text"
    assert payload(tree.feed(f.read(node, handle, 5, 2))) == b"te"
    assert payload(tree.feed(f.read(node, handle, 9, 10))) == b""
    assert payload(tree.feed(f.read(node, handle, 1 << 40, 10))) == b""


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC], ids=str)
def test_open_that_may_write_is_python_s(tree: Pair, flags: int) -> None:
    assert passed(tree.feed(f.open(look_up(tree, "file"), flags)))


@pytest.mark.parametrize("name", ["pipe", "socket", "link"])
def test_open_of_anything_but_a_file_is_python_s(tree: Pair, name: str) -> None:
    assert passed(tree.feed(f.open(look_up(tree, name))))


def test_open_of_a_file_with_xattrs_is_python_s(tree: Pair) -> None:
    """One of them may say that its data lie elsewhere."""
    assert passed(tree.feed(f.open(look_up(tree, "marked"))))


def test_no_more_files_are_open_than_descriptors_are_given(make_pair: Callable[..., Pair]) -> None:
    pair = lay_out(make_pair(descriptors=2))
    node, first = open_file(pair, "file")
    open_file(pair, "other")
    assert passed(pair.feed(f.open(node)))
    pair.feed(f.release(node, first))
    assert open_file(pair, "file")[1] == first
    pair.agree()


def test_release(tree: Pair) -> None:
    node, handle = open_file(tree, "file")
    assert payload(tree.feed(f.release(node, handle))) == b""
    assert tree.core.counts().open == 0
    assert error(tree.feed(f.read(node, handle, 0, 1))) == errno.EBADF
    assert payload(tree.feed(f.release(node, handle))) == b""  # once more does nothing
    assert passed(tree.feed(f.release(node, 9)))


def test_reads_that_make_no_sense(tree: Pair) -> None:
    node, handle = open_file(tree, "file")
    for offset, size in ((-1, 1), (1 << 63, 1), (0, READ_MAX + 1), ((1 << 63) - 1, 10)):
        assert error(tree.feed(f.read(node, handle, offset, size))) == errno.EINVAL
    assert error(tree.feed(f.read(node, NATIVE | 77, 0, 1))) == errno.EBADF
    assert passed(tree.feed(f.read(node, 77, 0, 1)))


def test_a_copied_up_file_is_read_where_it_is_now(tree: Pair, tmp_path: Path) -> None:
    node, handle = open_file(tree, "file")
    copy = tmp_path / "copy"
    copy.write_text("changed since")
    assert tree.switch(node, str(copy)) == 1
    assert payload(tree.feed(f.read(node, handle, 0, 100))) == b"changed since"
    assert tree.switch(tree.node("other"), str(copy)) == 0


def test_lseek(tree: Pair) -> None:
    with open(tree.layers[0] / "other", "r+b") as file:
        file.truncate(1 << 20)
    node, handle = open_file(tree, "other")
    (hole,) = f.LSEEK_OUT.unpack(payload(tree.feed(f.lseek(node, handle, 0, os.SEEK_HOLE))))
    assert hole <= 1 << 20
    assert error(tree.feed(f.lseek(node, handle, 1 << 20, os.SEEK_DATA))) == errno.ENXIO
    assert error(tree.feed(f.lseek(node, handle, 0, os.SEEK_CUR))) == errno.EINVAL
    assert error(tree.feed(f.lseek(node, NATIVE | 9, 0, os.SEEK_DATA))) == errno.EBADF


def test_flush_is_never_asked_for_again(tree: Pair) -> None:
    node, handle = open_file(tree, "file")
    assert error(tree.feed(f.flush(node, handle))) == errno.ENOSYS
    assert error(tree.feed(f.flush(node, NATIVE | 9))) == errno.EBADF
    assert passed(tree.feed(f.flush(node, 9)))


def test_fsync_of_a_lower_file_has_nothing_to_do(make_pair: Callable[..., Pair]) -> None:
    for carries in (False, True):
        pair = lay_out(make_pair(carries=carries))
        node, handle = open_file(pair, "file")
        assert payload(pair.feed(f.fsync(node, handle))) == b""
        assert passed(pair.feed(f.fsync(node, 9)))
        pair.adopt(ROOT, b"file")  # it may be in the upper by now
        answer = pair.feed(f.fsync(node, handle))
        assert answer.verdict is (Verdict.CARRIED if carries else Verdict.ANSWERED)


# -- files that Python opened and lent --------------------------------------------------------------------


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_text("in the upper")
    return path


def test_a_lent_file_is_read(tree: Pair, backing: Path) -> None:
    assert passed(tree.feed(f.read(77, 9, 0, 100)))
    assert tree.lend(9, str(backing), writes=False)
    assert payload(tree.feed(f.read(77, 9, 3, 100))) == b"the upper"
    assert passed(tree.feed(f.write(77, 9, 0, b"x")))
    for passed_on in (f.fsync(77, 9), f.flush(77, 9), f.release(77, 9)):
        assert passed(tree.feed(passed_on))
    tree.take_back(9)
    assert passed(tree.feed(f.read(77, 9, 0, 100)))


def test_a_lent_file_is_written(tree: Pair, backing: Path) -> None:
    tree.lend(9, str(backing), writes=True)
    assert f.WRITE_OUT.unpack(payload(tree.feed(f.write(77, 9, 3, b"THE")))) == (3, 0)
    assert backing.read_text() == "in THE upper"
    assert payload(tree.feed(f.write(77, 9, 100, b"far"))) == f.WRITE_OUT.pack(3, 0)
    assert backing.stat().st_size == 103
    assert payload(tree.feed(f.write(77, 9, 0, bytes(WRITE_MAX)))) == f.WRITE_OUT.pack(WRITE_MAX, 0)


def test_a_large_write_is_a_thread_s(tree: Pair, backing: Path) -> None:
    tree.lend(9, str(backing), writes=True)
    data = random.randbytes(WRITE_MAX + 1)
    for offset in (0, 5, 1 << 20):
        assert payload(tree.feed(f.write(77, 9, offset, data))) == f.WRITE_OUT.pack(len(data), 0)
        assert backing.read_bytes()[offset:] == data
    # nobody looks at a short count of what is written back: Python remembers the error
    assert passed(tree.feed(f.write(77, 9, 0, data, flags=f.WRITE_CACHE)))
    assert passed(tree.feed(f.write(77, 9, -1, data)))
    tree.lend(9, "/dev/full", writes=True)
    assert error(tree.feed(f.write(77, 9, 0, data))) == errno.ENOSPC
    tree.lend(9, str(backing), writes=True)
    tree.hold_writes(True)
    assert passed(tree.feed(f.write(77, 9, 0, data)))


def test_what_was_begun_before_writes_were_held_is_waited_for(tree: Pair, tmp_path: Path) -> None:
    """On a frozen file system, so that the write cannot end."""
    if reason := mounts.why_not_root():
        pytest.skip(reason)
    disk, point = tmp_path / "disk", tmp_path / "frozen"
    point.mkdir()
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, point], check=True)
    try:
        (point / "file").touch()
        tree.core.lend(9, str(point / "file"), writes=True)
        subprocess.run(["fsfreeze", "-f", point], check=True)
        begun = tree.core.answer(f.write(77, 9, 0, bytes(WRITE_MAX + 1)), arrive=False)
        assert begun.verdict is Verdict.ANSWERED and not begun.replies
        tree.core.hold_writes(True)
        waits = threading.Thread(target=tree.core.settle_writes)
        waits.start()
        waits.join(0.2)
        assert waits.is_alive()
        subprocess.run(["fsfreeze", "-u", point], check=True)
        waits.join()
        assert (point / "file").stat().st_size == WRITE_MAX + 1
    finally:
        subprocess.run(["fsfreeze", "-u", point], capture_output=True)
        tree.core.take_back(9)
        mounts.umount(point, mounts.MNT_DETACH)


def test_writes_that_are_python_s(tree: Pair, backing: Path) -> None:
    tree.lend(9, str(backing), writes=True)
    assert passed(tree.feed(f.write(77, 9, -1, b"x")))
    assert passed(tree.feed(f.write(77, 9, 0, b"cut")[:-1]))
    tree.hold_writes(True)
    assert passed(tree.feed(f.write(77, 9, 0, b"held")))
    assert backing.read_text() == "in the upper"


def test_a_write_of_one_who_may_keep_setuid_says_so_in_its_handle(tree: Pair) -> None:
    """libfuse hands on no write_flags."""
    plain = f.write(77, 9, 0, b"x")
    assert tree.feed(plain).frame == plain
    tree.init_flags(f.HANDLE_KILLPRIV_V2, f.HANDLE_KILLPRIV_V2)
    assert tree.feed(plain).frame == f.write(77, 9 | KEEPS_SETID, 0, b"x")
    kills = f.write(77, 9, 0, b"x", flags=f.WRITE_KILL_SUIDGID)
    assert tree.feed(kills).frame == kills


# -- files that are opened without asking -----------------------------------------------------------------


@pytest.fixture
def unasked(make_pair: Callable[..., Pair]) -> Pair:
    return lay_out(make_pair(openless=True, carries=True))


def carried(answer: Answer) -> bool:
    return answer.verdict is Verdict.CARRIED


def test_open_is_not_asked_for_again(unasked: Pair) -> None:
    for name in ("file", "marked", "pipe"):
        node = look_up(unasked, name)
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            assert error(unasked.feed(f.open(node, flags))) == errno.ENOSYS
    assert error(unasked.feed(f.flush(node, 0))) == errno.ENOSYS


def test_a_node_is_read_without_a_handle(unasked: Pair) -> None:
    node = look_up(unasked, "file")
    assert payload(unasked.feed(f.read(node, 0, 0, 4096))) == b"some text"
    assert payload(unasked.feed(f.read(node, 0, 5, 2))) == b"te"
    assert unasked.core.counts().open == 1
    assert payload(unasked.feed(f.fsync(node, 0))) == b""
    (hole,) = f.LSEEK_OUT.unpack(payload(unasked.feed(f.lseek(node, 0, 0, os.SEEK_HOLE))))
    assert hole == len("some text")
    unasked.feed(f.forget(node, 1))
    assert unasked.core.counts().open == 0
    unasked.agree()


def test_nodes_that_python_reads(unasked: Pair) -> None:
    """Where the data lie elsewhere, or Python has the node."""
    for node in (look_up(unasked, "marked"), look_up(unasked, "link"), 77):
        assert carried(unasked.feed(f.read(node, 0, 0, 10)))
        assert carried(unasked.feed(f.lseek(node, 0, 0, os.SEEK_DATA)))
    node = look_up(unasked, "file")
    unasked.feed(f.read(node, 0, 0, 10))
    assert unasked.adopt(ROOT, b"file") == 1
    assert unasked.core.counts().open == 0
    for frame in (f.read(node, 0, 0, 10), f.fsync(node, 0), f.write(node, 0, 0, b"x")):
        assert carried(unasked.feed(frame))


def test_what_is_read_without_a_handle_is_what_is_there_now(unasked: Pair, backing: Path) -> None:
    node = look_up(unasked, "file")
    unasked.feed(f.read(node, 0, 0, 10))
    unasked.adopt(ROOT, b"file")  # it is copied up
    unasked.lend(node, str(backing), writes=True)
    assert payload(unasked.feed(f.read(node, 0, 0, 100))) == b"in the upper"


def test_a_lent_node_is_written(unasked: Pair, backing: Path) -> None:
    unasked.lend(77, str(backing), writes=True)
    assert payload(unasked.feed(f.write(77, 0, 3, b"THE"))) == f.WRITE_OUT.pack(3, 0)
    assert backing.read_text() == "in THE upper"
    for how in (os.O_SYNC, os.O_DSYNC):  # of an open that nobody saw
        assert carried(unasked.feed(f.write(77, 0, 0, b"x", how=how)))
    assert carried(unasked.feed(f.write(77, 0, 0, bytes(WRITE_MAX + 1), flags=f.WRITE_CACHE)))
    unasked.hold_writes(True)
    assert carried(unasked.feed(f.write(77, 0, 0, b"held")))
    unasked.hold_writes(False)
    unasked.lend(77, str(backing), writes=False)
    assert carried(unasked.feed(f.write(77, 0, 0, b"x")))
    assert backing.read_text() == "in THE upper"


def test_as_many_nodes_are_kept_open_as_descriptors_are_given(make_pair: Callable[..., Pair]) -> None:
    """The rest are opened again: what was read first, and not since, is closed."""
    pair = lay_out(make_pair(openless=True, descriptors=2))
    names = [f"n{number}" for number in range(8)]
    for name in names:
        (pair.layers[0] / name).write_text(name)
    pair.forget_directory(ROOT)
    pair.publish()
    nodes = [look_up(pair, name) for name in names]
    for _ in range(3):
        for name, node in zip(names, nodes, strict=True):
            assert payload(pair.feed(f.read(node, 0, 0, 100))) == name.encode()
            assert pair.core.counts().open <= 2
    for node in nodes:
        pair.feed(f.forget(node, 1))
    assert pair.core.counts().open == 0


def test_directories_of_a_read_only_mount_are_opened_without_asking(make_pair: Callable[..., Pair]) -> None:
    pair = lay_out(make_pair(openless=True, opendirless=True, carries=True))
    opendir = f.frame(f.OPENDIR, ROOT, f.OPEN_IN.pack(0, 0))
    assert error(pair.feed(opendir)) == errno.ENOSYS
    assert payload(pair.feed(f.frame(f.FSYNCDIR, ROOT, f.OPEN_IN.pack(0, 0)))) == b""
    assert carried(pair.feed(f.readdirplus(ROOT, 0, 0)))  # Python lists it
    pair.list_names(ROOT, ROOT, [b"file", b"link"])
    for _ in range(2):  # names never change
        listed = payload(pair.feed(f.readdirplus(ROOT, 0, 0)))
        assert f.names_of(listed) == [b".", b"..", b"file", b"link"]
    pair.adopt(ROOT, b"file")
    assert carried(pair.feed(f.readdirplus(ROOT, 0, 2)))
    assert f.names_of(payload(pair.feed(f.readdirplus(ROOT, 0, pair.offset(b"file"))))) == [b"link"]


def test_what_was_created_before_the_first_open_is_released(unasked: Pair) -> None:
    assert payload(unasked.feed(f.release(77, 0))) == b""
    assert passed(unasked.feed(f.release(77, 0, f.RELEASEDIR)))


def test_an_open_that_cuts_is_a_setattr(unasked: Pair) -> None:
    libfuse = f.INIT_OUT.pack(7, 38, 0, 1 << 5 | f.ATOMIC_O_TRUNC, 12, 9, 1 << 20, 1, 256, 0, 0, 0)
    packet = unasked.libfuse_replies(f.INIT, libfuse)
    assert packet == f.INIT_OUT.pack(7, 38, 0, 1 << 5, 12, 9, 1 << 20, 1, 256, 0, 0, 0)


# -- replies of libfuse ---------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [b"", b"of a later version"], ids=["", "longer"])
def test_init_is_answered_with_more_flags(tree: Pair, behind: bytes) -> None:
    asked = 1 << 23 | 1 << 6 | 1 << 37
    tree.init_flags(offered=1 << 23 | 1 << 37 | 1 << 3, wanted=asked)
    libfuse = f.INIT_OUT.pack(7, 38, 0, 1 << 5, 12, 9, 1 << 20, 1, 256, 0, 1 << 2, 0)
    wanted = f.INIT_OUT.pack(
        7, 38, 0, 1 << 5 | 1 << 23 | f.INIT_EXT, 12, 9, 1 << 20, 1, 256, 0, 1 << 2 | 1 << 5, 0
    )
    assert tree.libfuse_replies(f.INIT, libfuse + behind) == wanted + behind


def test_init_of_a_kernel_without_those_flags(tree: Pair) -> None:
    tree.init_flags(offered=1 << 3, wanted=1 << 23 | 1 << 37)
    libfuse = f.INIT_OUT.pack(7, 30, 0, 1 << 5, 12, 9, 1 << 20, 1, 256, 0, 0, 0)
    assert tree.libfuse_replies(f.INIT, libfuse) == libfuse


def test_init_asks_for_idmapped_mounts(tree: Pair) -> None:
    tree.init_flags(offered=f.ALLOW_IDMAP | f.SETXATTR_EXT, wanted=f.ALLOW_IDMAP | f.SETXATTR_EXT)
    libfuse = f.INIT_OUT.pack(7, 31, 0, 1 << 5, 12, 9, 1 << 20, 1, 256, 0, 0, 0)
    flags = 1 << 5 | f.SETXATTR_EXT | f.INIT_EXT
    wanted = f.INIT_OUT.pack(7, 31, 0, flags, 12, 9, 1 << 20, 1, 256, 0, 1 << 8, 0)
    assert tree.libfuse_replies(f.INIT, libfuse) == wanted


def test_the_kernel_keeps_what_the_gate_lists(tree: Pair) -> None:
    tree.list_names(LISTS_ROOT, ROOT, [b"file"])
    kept = f.OPEN_OUT.pack(LISTS_ROOT, f.FOPEN_CACHE_DIR | f.FOPEN_KEEP_CACHE, 0)
    assert tree.libfuse_replies(f.OPENDIR, f.OPEN_OUT.pack(LISTS_ROOT, 0, 0)) == kept
    other = f.OPEN_OUT.pack(6, 0, 0)
    assert tree.libfuse_replies(f.OPENDIR, other) == other


def test_other_replies_stay_as_they_are(tree: Pair) -> None:
    tree.list_names(LISTS_ROOT, ROOT, [b"file"])
    for opcode, payload in (
        (f.OPEN, f.OPEN_OUT.pack(LISTS_ROOT, 0, 0)),
        (f.INIT, b"short"),
        (f.READ, bytes(64)),
    ):
        assert tree.libfuse_replies(opcode, payload) == payload


# -- passthrough ---------------------------------------------------------------------------------------


def opened(pair: Pair, node: int) -> tuple[int, int, int]:
    """(handle, flags, backing file) of an open that the gate answers."""
    handle, flags, backing = f.OPEN_OUT.unpack(payload(pair.feed(f.open(node))))
    assert handle & NATIVE
    return handle, flags, backing


def test_the_kernel_hears_of_the_depth(tree: Pair) -> None:
    tree.pass_through(2, lowers=True)
    libfuse = f.INIT_OUT.pack(7, 38, 0, 1 << 5, 12, 9, 1 << 20, 1, 256, 0, 0, 0)
    tree.init_flags(offered=0, wanted=f.PASSTHROUGH)
    assert tree.libfuse_replies(f.INIT, libfuse) == libfuse
    tree.init_flags(offered=f.PASSTHROUGH, wanted=f.PASSTHROUGH)
    wanted = f.INIT_OUT.pack(7, 38, 0, 1 << 5 | f.INIT_EXT, 12, 9, 1 << 20, 1, 256, 0, 1 << 5, 2)
    assert tree.libfuse_replies(f.INIT, libfuse) == wanted


def test_all_handles_of_a_node_share_a_backing_file(tree: Pair) -> None:
    tree.pass_through(1, lowers=True)
    node, other = look_up(tree, "file"), look_up(tree, "other")
    one, flags, backing = opened(tree, node)
    assert flags == f.FOPEN_PASSTHROUGH and backing > 0
    two, *same = opened(tree, node)
    assert same == [flags, backing]
    assert opened(tree, other)[2] not in (0, backing)
    assert tree.open_backing(20, node, allowed=False) == backing  # Python's, too
    for handle in (one, two):
        tree.feed(f.release(node, handle))
        tree.agree()
    assert tree.open_backing(21, node, allowed=True) == backing
    tree.close_backing(20, node)
    tree.close_backing(21, node)
    tree.agree()
    assert opened(tree, node)[2] not in (0, backing)


def test_lower_files_of_a_writable_mount_are_cached(tree: Pair) -> None:
    tree.pass_through(1, lowers=False)
    node = look_up(tree, "file")
    handle, *cached = opened(tree, node)
    assert cached == [f.FOPEN_KEEP_CACHE, 0]
    # Copied up meanwhile: the kernel would not take it any other way.
    assert tree.open_backing(20, node, allowed=True) == 0
    tree.feed(f.release(node, handle))
    assert tree.open_backing(21, node, allowed=True) == 0
    tree.close_backing(20, node)
    tree.close_backing(21, node)
    assert tree.open_backing(22, node, allowed=True) > 0


def test_replies_of_python_name_the_backing_file(tree: Pair) -> None:
    tree.pass_through(1, lowers=False)
    backing = tree.open_backing(20, 77, allowed=True)
    passed_through = f.OPEN_OUT.pack(20, f.FOPEN_PASSTHROUGH, backing)
    cached = f.OPEN_OUT.pack(20, f.FOPEN_KEEP_CACHE, 0)
    assert tree.libfuse_replies(f.OPEN, cached) == passed_through
    assert tree.libfuse_replies(f.CREATE, bytes(128) + cached) == bytes(128) + passed_through
    other = f.OPEN_OUT.pack(21, f.FOPEN_KEEP_CACHE, 0)
    assert tree.libfuse_replies(f.OPEN, other) == other
    assert tree.libfuse_replies(f.OPEN, b"short") == b"short"
    tree.close_backing(20, 77)
    assert tree.libfuse_replies(f.OPEN, cached) == cached


def test_an_open_that_nobody_waits_for_leaves_nothing(tree: Pair) -> None:
    tree.pass_through(1, lowers=True)
    node = look_up(tree, "file")
    tree.plug(False)
    tree.feed(f.open(node))
    tree.plug(True)
    tree.agree()
    assert tree.core.counts().backings == 0


# -- what is carried, what is passed -------------------------------------------------------------------

CARRIED = (f.FALLOCATE, f.COPY_FILE_RANGE, f.TMPFILE, f.STATX, f.COPY_FILE_RANGE_64)


@pytest.mark.parametrize("opcode", CARRIED)
def test_what_pyfuse3_cannot_carry(make_pair: Callable[..., Pair], opcode: int) -> None:
    frame = f.frame(opcode, ROOT, bytes(64))
    answer = make_pair(carries=True).feed(frame)
    assert answer == Answer(Verdict.CARRIED, frame)
    assert error(make_pair(carries=False).feed(frame)) == errno.ENOSYS


def test_setxattr_is_carried_in_its_longer_form(make_pair: Callable[..., Pair]) -> None:
    """libfuse would take the rest of the header for the name."""
    pair = make_pair(carries=True)
    frame = f.frame(f.SETXATTR, ROOT, bytes(64))
    for offered, wanted in ((0, f.SETXATTR_EXT), (f.SETXATTR_EXT, 0)):
        pair.init_flags(offered, wanted)
        assert pair.feed(frame) == Answer(Verdict.PASSED, frame)
    pair.init_flags(f.SETXATTR_EXT, f.SETXATTR_EXT)
    assert pair.feed(frame) == Answer(Verdict.CARRIED, frame)


@pytest.mark.parametrize("command", [*f.INODE_IOCTLS, 0x5401, 0, (1 << 32) - 1])
def test_ioctl(make_pair: Callable[..., Pair], command: int) -> None:
    """Flags and attributes of inodes are carried; nothing else is what a file has. 0x5401 asks whether it is
    a terminal: every open() of Python's does."""
    answer = make_pair(carries=True).feed(f.ioctl(ROOT, 9, command))
    if command in f.INODE_IOCTLS:
        assert answer.verdict is Verdict.CARRIED
    else:
        assert error(answer) == errno.ENOTTY


def test_lseek_of_python_s_files_is_carried(make_pair: Callable[..., Pair]) -> None:
    frame = f.lseek(ROOT, 9, 0, os.SEEK_DATA)
    assert make_pair(carries=True).feed(frame).verdict is Verdict.CARRIED
    assert error(make_pair(carries=False).feed(frame)) == errno.ENOSYS


def test_interrupts_of_what_pyfuse3_has_not_got(tree: Pair) -> None:
    """Passed, libfuse would have the kernel send them again and again."""
    frame = f.frame(f.INTERRUPT, 0, f.INTERRUPT_IN.pack(77))
    assert tree.feed(frame) == Answer(Verdict.ANSWERED, frame)


NATIVE_OPCODES = {
    *(f.LOOKUP, f.FORGET, f.GETATTR, f.READLINK, f.OPEN, f.READ, f.STATFS, f.RELEASE, f.FSYNC, f.GETXATTR),
    *(f.LISTXATTR, f.FLUSH, f.RELEASEDIR, f.BATCH_FORGET, f.READDIRPLUS, f.LSEEK, f.WRITE, f.IOCTL),
    f.INTERRUPT,
}


@pytest.mark.parametrize("opcode", sorted(set(range(64)) - NATIVE_OPCODES - {*CARRIED}) + [64, 4096, 1 << 31])
def test_everything_else_is_passed_as_it_is(tree: Pair, opcode: int) -> None:
    frame = f.frame(opcode, look_up(tree, "file"), bytes(100))
    assert tree.feed(frame) == Answer(Verdict.PASSED, frame)


@pytest.mark.parametrize("opcode", sorted(NATIVE_OPCODES | {*CARRIED}))
def test_frames_that_are_cut_anywhere(tree: Pair, opcode: int) -> None:
    node, handle = open_file(tree, "file")
    body = struct.pack("<QQ", handle, 0) + bytes(32)
    whole = f.frame(opcode, node, body)
    for length in range(len(whole), -1, -1):
        tree.feed(whole[:length])
    tree.agree()
