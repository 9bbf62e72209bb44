"""`layerfs stat` on real mounts: numbers against a known workload, the JSON's types, and what it says when
there is nothing to ask."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import io
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from rich.console import Console

from layerfs.cli import stat as stat_command
from layerfs.cli import stat_view
from layerfs.control import wire
from layerfs.control.statistics import Requests, Statistics
from tests.cli.conftest import USER, Box, eventually, make_box
from tests.support import mounts

MIB = 1 << 20


def asked(box: Box) -> Statistics:
    done = box.layerfs("stat", box("m"), "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(done.stdout.splitlines()) == 1
    said: Statistics = json.loads(done.stdout)
    return said


def work(box: Box, script: str) -> None:
    """Runs `script` as the box's user; `m` is the mount point."""
    done = box.run(sys.executable, "-c", f"import os, sys\nm = sys.argv[1]\n{script}", box("m"))
    assert done.returncode == 0, done.stderr


def count(said: Statistics, kind: str) -> int:
    each = said["requests"].get(kind)
    return each["native"] + each["python"] if each is not None else 0


def lower_file(box: Box, name: str, size: int) -> None:
    path = Path(box("a")) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(size))
    for each in (path, path.parent):
        box.own(each)


@pytest.fixture
def mounted(box: Box) -> Box:
    """Closed, as every box, at the end of its test."""
    for name in ("appended", "read", "chmodded", "d/inside"):
        lower_file(box, name, MIB)
    box.mount()
    return box


# -- what is counted ---------------------------------------------------------------------------------


def test_absent_names_and_creates(mounted: Box) -> None:
    before = asked(mounted)
    work(mounted, "for n in range(37): os.path.lexists(f'{m}/absent{n}')")
    after = asked(mounted)
    assert count(after, "lookup") - count(before, "lookup") == 37
    work(
        mounted, "for n in range(23): os.close(os.open(f'{m}/new{n}', os.O_CREAT | os.O_EXCL | os.O_WRONLY))"
    )
    # The kernel does not wait for RELEASE.
    assert eventually(lambda: count(asked(mounted), "release") - count(after, "release") == 23)
    last = asked(mounted)
    assert count(last, "create") - count(after, "create") == 23
    assert last["copyups"] == before["copyups"] == dict.fromkeys(before["copyups"], 0)


def test_an_answer_that_is_an_error_counts(mounted: Box) -> None:
    work(mounted, "try: os.rmdir(m + '/d')\nexcept OSError: pass")
    assert count(asked(mounted), "rmdir") == 1


def test_the_first_append_copies_up(mounted: Box) -> None:
    work(mounted, "open(m + '/appended', 'ab').write(b'x')")
    said = asked(mounted)
    copyups = said["copyups"]
    assert (copyups["count"], copyups["directories"], copyups["metadata_only"]) == (1, 0, 0)
    assert (copyups["reflinked"], copyups["bytes"]) in ((0, MIB), (1, 0))
    assert said["bytes"]["written"] == 1
    work(mounted, "open(m + '/appended', 'ab').write(b'x')")
    again = asked(mounted)
    assert again["copyups"] == copyups and again["bytes"]["written"] == 2


def test_attributes_alone_copy_no_data(mounted: Box) -> None:
    work(mounted, "os.chmod(m + '/chmodded', 0o600)")
    copyups = asked(mounted)["copyups"]
    assert copyups == {"count": 1, "directories": 0, "metadata_only": 1, "reflinked": 0, "bytes": 0}
    work(mounted, "open(m + '/chmodded', 'ab').write(b'x')")
    copyups = asked(mounted)["copyups"]
    assert (copyups["count"], copyups["metadata_only"]) == (2, 1)
    assert copyups["bytes"] == (0 if copyups["reflinked"] else MIB)


def test_directories_are_copied_up(mounted: Box) -> None:
    work(mounted, "os.mkdir(m + '/d/new')")
    copyups = asked(mounted)["copyups"]
    assert copyups == {"count": 1, "directories": 1, "metadata_only": 0, "reflinked": 0, "bytes": 0}


def test_bytes_read(mounted: Box) -> None:
    work(mounted, "assert len(open(m + '/read', 'rb').read()) == 1 << 20")
    assert asked(mounted)["bytes"] == {"read": MIB, "written": 0}


def test_times_add_up(mounted: Box) -> None:
    work(mounted, "for n in range(5): os.listdir(m); os.mkdir(f'{m}/{n}')")
    said = asked(mounted)
    for kind, each in said["requests"].items():
        assert sum(each["python_us"]) == each["python"] or not each["python_us"], kind
        assert not each["python_us"] or each["python_us"][-1], kind
    # Making a directory takes some microseconds, and no second.
    used = [k for k, n in enumerate(said["requests"]["mkdir"]["python_us"]) if n]
    assert 3 <= used[0] <= used[-1] <= 20


def test_the_daemon(mounted: Box) -> None:
    said = asked(mounted)
    pid = mounted.daemon()
    status = Path(f"/proc/{pid}/status").read_text()
    (resident,) = (int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))
    assert abs(said["memory"] - resident) < 4 * MIB
    assert abs(said["descriptors"] - len(os.listdir(f"/proc/{pid}/fd"))) <= 3  # one is the asker's
    assert 0 < said["uptime"] < 60


def test_asking_asks_nothing_of_the_file_system_but_who_it_is(mounted: Box) -> None:
    first, second = asked(mounted), asked(mounted)
    kinds = set(first["requests"]) | set(second["requests"])
    changed = {kind for kind in kinds if count(first, kind) != count(second, kind)}
    assert changed <= {"getxattr", "forget"}  # the latter whenever the kernel likes


def test_open_files_are_nodes_and_descriptors(mounted: Box) -> None:
    before = asked(mounted)
    script = "import sys\nheld = [open(f'{sys.argv[1]}/new{n}', 'w') for n in range(23)]\nprint()\ninput()"
    holder = mounted.popen(sys.executable, "-c", script, mounted("m"), stdin=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == "\n"
    after = asked(mounted)
    holder.communicate("\n")
    assert after["nodes"] >= 1 + 23
    assert after["descriptors"] - before["descriptors"] >= 23


def test_a_read_only_mount(box: Box) -> None:
    done = box.layerfs("mount", "--lower", box("a"), "--lower", box("b"), box("m"))
    assert done.returncode == 0, done.stderr
    work(box, "for n in range(11): os.path.lexists(f'{m}/absent{n}')")
    said = asked(box)
    check(said, Statistics)
    assert count(said, "lookup") == 11
    assert box.layerfs("stat", box("m")).stdout.startswith("layerfs ")


# -- the object --------------------------------------------------------------------------------------


def check(value: Any, wanted: Any, where: str = "") -> None:
    """That `value`, out of JSON, is of the type `wanted`, with no key more and none less."""
    if is_typeddict(wanted):
        hints = get_type_hints(wanted)
        assert isinstance(value, dict) and value.keys() == hints.keys(), where
        for key, hint in hints.items():
            check(value[key], hint, f"{where}.{key}")
    elif get_origin(wanted) is dict:
        of_key, of_value = get_args(wanted)
        for key, each in value.items():
            check(key, of_key, where)
            check(each, of_value, f"{where}.{key}")
    elif get_origin(wanted) is list:
        assert isinstance(value, list), where
        for each in value:
            check(each, *get_args(wanted), where)
    else:
        assert type(value) is wanted, f"{where}: {value!r}"
        assert not isinstance(value, (int, float)) or value >= 0, where


def test_types(mounted: Box) -> None:
    work(mounted, "os.listdir(m); open(m + '/new', 'w').write('1')")
    said = asked(mounted)
    check(said, Statistics)
    assert said["requests"] and all(kind.islower() for kind in said["requests"])
    assert said["data"]["mode"] in ("python", "cached", "passthrough")
    assert said["data"]["why"] and said["gate"]["why"]


def test_the_help_names_every_key(box: Box) -> None:
    done = box.layerfs("stat", "--help")
    words = {part for word in done.stdout.split() for part in word.split(".")}

    def keys(kind: Any) -> Iterator[str]:
        for key, hint in get_type_hints(kind).items():
            yield key
            if is_typeddict(hint):
                yield from keys(hint)

    assert set(keys(Statistics)) | set(keys(Requests)) <= words
    assert stat_command._KEYS.splitlines()[-1] in done.stdout


# -- for people --------------------------------------------------------------------------------------


def test_a_plain_table_off_a_terminal(mounted: Box) -> None:
    work(mounted, "for n in range(7): os.path.lexists(f'{m}/absent{n}')")
    done = mounted.layerfs("stat", mounted("m"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii() and "\x1b" not in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    table = [row for row in rows if row[:2] == ["lookup", "python"] or row[:2] == ["lookup", "gate"]]
    assert sum(int(row[2]) for row in table) == 7
    assert ["copied", "up", "0", "bytes"] in rows and any(row[:1] == ["memory"] for row in rows)


@contextlib.contextmanager
def on_a_terminal(box: Box, *arguments: str, **env: str) -> Iterator[tuple[Any, int]]:
    """`layerfs stat` with a terminal of its own: the process and the terminal's other end."""
    outer, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
    process = box.popen(
        *mounts.layerfs_command(),
        "stat",
        box("m"),
        *arguments,
        stdin=inner,
        stdout=inner,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | box.env | {"HOME": str(box.dir), "TERM": "xterm", "LC_ALL": "C.UTF-8"} | env,
    )
    os.set_blocking(outer, False)
    try:
        yield process, outer
    finally:
        process.kill()
        process.communicate()
        os.close(inner)
        os.close(outer)


def seen(terminal: int, wanted: str, patience: float = 20) -> bool:
    """Whether `wanted` comes."""
    text, end = "", time.monotonic() + patience
    while wanted not in text and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
    return wanted in text


@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "Ctrl-C"])
def test_the_live_view(mounted: Box, key: str) -> None:
    with on_a_terminal(mounted, "--interval", "0.1") as (process, terminal):
        before = termios.tcgetattr(terminal)
        assert seen(terminal, "copy-ups") and seen(terminal, "/s")
        assert not termios.tcgetattr(terminal)[3] & termios.ICANON
        work(mounted, "for n in range(4321): os.path.lexists(f'{m}/absent{n}')")
        assert seen(terminal, "4,32")  # the gate leaves the first to Python
        os.write(terminal, key.encode())
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
        assert termios.tcgetattr(terminal) == before


def test_the_live_view_ends_with_the_mount(mounted: Box) -> None:
    with on_a_terminal(mounted, "--interval", "0.1") as (process, terminal):
        before = termios.tcgetattr(terminal)
        assert seen(terminal, "copy-ups")
        mounted.umount()
        assert process.wait(20) == 1
        (line,) = process.stderr.read().splitlines()
        assert line.startswith(f"layerfs stat: {mounted('m')}: its daemon cannot be asked")
        assert termios.tcgetattr(terminal) == before


def test_a_terminal_that_can_nothing_gets_the_plain_table(mounted: Box) -> None:
    with on_a_terminal(mounted, TERM="dumb") as (process, terminal):
        assert process.wait(20) == 0
        assert "\x1b" not in os.read(terminal, 65536).decode()


# -- nothing to ask ----------------------------------------------------------------------------------


def refused(box: Box, path: str, *more: str) -> str:
    """The one line of an error with exit code 1."""
    done = box.layerfs("stat", path, *more)
    assert (done.returncode, done.stdout) == (1, ""), done
    (line,) = done.stderr.splitlines()
    return line.removeprefix("layerfs stat: ")


def test_no_mount(box: Box) -> None:
    assert refused(box, box("m")) == f"{box('m')}: is not the root of a layerfs mount"
    assert refused(box, box("absent"), "--json") == f"{box('absent')}: no such directory"


def test_inside_a_mount(mounted: Box) -> None:
    assert refused(mounted, mounted("m/d")).endswith("is not the root of a layerfs mount")


def test_a_dead_daemon(mounted: Box) -> None:
    mounted.kill(signal.SIGKILL)
    assert "is a dead mount" in refused(mounted, mounted("m"))


def test_no_control_socket(mounted: Box) -> None:
    os.unlink(os.path.join(mounted("w"), wire.STATE, wire.SOCKET))
    said = refused(mounted, mounted("m"))
    assert said == f"{mounted('m')}: its daemon cannot be asked (No such file or directory)"


def test_a_stranger_is_told_nothing(root_box: Box) -> None:
    """root's mounts are open to all."""
    root_box.mount()
    other = make_box(USER)
    try:
        assert refused(other, root_box("m")).endswith("is not the root of a layerfs mount")
    finally:
        other.close()


def test_a_mount_that_is_closed_even_to_root(root: None, user_box: Box) -> None:
    user_box.mount()
    other = make_box(0)
    try:
        assert "was mounted by somebody else" in refused(other, user_box("m"))
    finally:
        other.close()


@pytest.mark.parametrize("interval", ["0", "-1", "soon", "nan"])
def test_wrong_intervals(box: Box, interval: str) -> None:
    done = box.layerfs("stat", box("m"), "--interval", interval)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


# -- how it looks ------------------------------------------------------------------------------------


def test_powers() -> None:
    shown = {0: "1us", 9: "512us", 10: "1ms", 19: "512ms", 20: "1s", 26: "64s", 31: "2048s"}
    assert {bucket: stat_view.power(bucket) for bucket in shown} == shown


@pytest.mark.parametrize(
    ("times", "median", "almost_all"),
    [
        ([], "", ""),
        ([1], "<1us", "<1us"),
        ([0, 0, 99, 0, 1], "<4us", "<4us"),
        ([0, 50, 0, 50], "<2us", "<8us"),
    ],
)
def test_bounds(times: list[int], median: str, almost_all: str) -> None:
    assert (stat_view.bound(times, 0.5), stat_view.bound(times, 0.99)) == (median, almost_all)


def test_bars() -> None:
    assert stat_view.bars([0, 1, 0, 80, 40], 1, 7) == "▁ █▄  "
    assert stat_view.bars([], 0, 3) == "   "


SAID: Statistics = {
    "version": "1",
    "uptime": 5.0,
    "data": {"mode": "cached", "why": "a\x1b[2J"},
    "gate": {"on": True, "why": "it was built", "entries": 3, "known": 2, "bytes": 1000},
    "requests": {
        "lookup": {"native": 1000, "python": 2, "native_us": [], "python_us": [0, 2]},
        "read": {"native": 3, "python": 0, "native_us": [1, 2], "python_us": []},
    },
    "copyups": {"count": 0, "directories": 0, "metadata_only": 0, "reflinked": 0, "bytes": 0},
    "bytes": {"read": 0, "written": 0},
    "nodes": 1,
    "memory": 1,
    "descriptors": 1,
}


def test_both_who_answer_have_a_line() -> None:
    shown = "\n".join(stat_view.lines(SAID))
    assert "gate         on: it was built (3 names, 2 nodes, 1,000 bytes)\n" in shown
    assert shown.isprintable() is False and "\x1b" not in shown
    assert shown.partition("\n\n")[2].splitlines() == [
        "request  by      count  median  99 %  <1us  <2us",
        "lookup   gate    1,000",
        "read     gate        3    <2us  <2us     1     2",
        "lookup   python      2    <2us  <2us     .     2",
    ]


@pytest.mark.parametrize("gate_measures", [True, False])
def test_a_screen_with_whatever_there_is(gate_measures: bool) -> None:
    lookups: Requests = {"native": 2, "python": 0, "native_us": [2] if gate_measures else [], "python_us": []}
    later = copy.deepcopy(SAID) | {"uptime": 7.0, "requests": {"lookup": lookups}}
    console = Console(width=100, record=True, file=io.StringIO())
    for now, before in ((SAID, None), (later, SAID), (SAID | {"requests": {}}, SAID), (SAID, SAID)):
        console.print(stat_view.screen(now, before))
    text = console.export_text()
    assert "\x1b" not in text and "512s" not in text
    assert ("█" in text) and ("<1us to <1us" in text) == gate_measures
