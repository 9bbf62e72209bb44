"""Order of turns, who is left out, and what is kept of a job that goes wrong.

The file systems are copies: nothing is timed, and only the layers are mounted (on themselves, read-only)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fsbench.commands import BenchmarkError
from benchmarks.fsbench.contenders import Contender
from benchmarks.fsbench.groups import Group
from benchmarks.fsbench.measures import QUICK, Sizes
from benchmarks.fsbench.rounds import Bench
from benchmarks.fsbench.stacks import Stack

pytestmark = pytest.mark.root


class Copy(Contender):
    """Shows a copy of the merged tree, spoiled if asked for."""

    fuse = False

    def __init__(self, name: str, spoil: Callable[[Path], None] = lambda mnt: None) -> None:
        self.name = name
        self._spoil = spoil

    def mount(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> float:
        for name in reversed(stack.names):
            shutil.copytree(stack.layers / name, mnt, dirs_exist_ok=True)
        self._spoil(mnt)
        return 0.001


class Turns(Group):
    """Notes whose turn it was; takes as long as the name is."""

    name = "turns"

    def __init__(self, spoiled: str = "") -> None:
        self.turns: list[str] = []
        self._spoiled = spoiled

    def rounds(self, sizes: Sizes) -> int:
        return sizes.rounds

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        self.turns.append(contender.name)

        def check() -> None:
            if contender.name == self._spoiled and len(self.turns) > len(bench.contenders):
                raise BenchmarkError("not what it should be")

        with bench.place(contender, stack) as place:
            place.time(
                "length", "length of the name", 1, lambda: float(len(contender.name)), check, unit="ms"
            )


def run(tmp_path: Path, contenders: list[Contender], group: Group, rounds: int = 3, **more: float) -> Bench:
    tmp_path.mkdir(exist_ok=True)
    bench = Bench(contenders, replace(QUICK, rounds=rounds, files=100), tmp_path, **more)
    bench.run([group])
    return bench


def test_turns_turn(root: None, tmp_path: Path) -> None:
    group = Turns()
    bench = run(tmp_path, [Copy("a"), Copy("bb"), Copy("ccc")], group)
    assert group.turns == ["a", "bb", "ccc", "bb", "ccc", "a", "ccc", "a", "bb"]
    assert bench.measures["length"].ratios("bb", "a") == [2, 2, 2]
    assert bench.failures == []


def test_when_the_time_is_over_there_is_one_round(root: None, tmp_path: Path) -> None:
    group = Turns()
    run(tmp_path, [Copy("a"), Copy("bb")], group, seconds=0)
    assert group.turns == ["a", "bb"]


def test_who_shows_something_else_is_left_out(root: None, tmp_path: Path) -> None:
    group = Turns()

    def lose(mnt: Path) -> None:
        if (mnt / "d0001").exists() and (mnt / "d0001" / "file07").read_text().endswith("layer 1\n"):
            (mnt / "d0001" / "file07").unlink()

    bench = run(tmp_path, [Copy("a"), Copy("bb", lose)], group)
    assert set(group.turns) == {"a"}
    assert bench.failures == ["bb, mixed, left out: 1 names missing, 0 too many"]


def test_who_cannot_be_mounted_is_left_out_with_the_reason(root: None, tmp_path: Path) -> None:
    def refuse(mnt: Path) -> None:
        raise BenchmarkError("unknown mount option: gate=on")

    bench = run(tmp_path, [Copy("a"), Copy("bb", refuse)], Turns())
    assert bench.left_out == {"bb": "unknown mount option: gate=on"}
    assert bench.failures == []
    with pytest.raises(BenchmarkError, match="unknown mount option"):
        run(tmp_path / "again", [Copy("a", refuse), Copy("bb")], Turns())  # nothing to compare with


def test_one_wrong_result_takes_all_times_away(root: None, tmp_path: Path) -> None:
    bench = run(tmp_path, [Copy("a"), Copy("bb")], Turns(spoiled="bb"))
    measure = bench.measures["length"]
    assert measure.wrong == {"bb": "not what it should be"}
    assert measure.value("bb") is None
    assert measure.value("a") == 1000


def test_nobody_can_change_the_layers(root: None, tmp_path: Path) -> None:
    errors = []

    def write(stack: Stack) -> None:
        try:
            (stack.layers / "0" / "new").touch()
        except OSError as error:
            errors.append(error.strerror)

    class Writes(Turns):
        def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
            write(stack)

    run(tmp_path, [Copy("a")], Writes(), rounds=1)
    assert errors == ["Read-only file system"]


def test_what_cannot_be_prepared_is_skipped_with_the_reason(root: None, tmp_path: Path) -> None:
    class Lacking(Turns):
        def prepare(self, scratch: Path, sizes: Sizes) -> None:
            raise BenchmarkError("fio is not installed")

    bench = run(tmp_path, [Copy("a")], Lacking())
    assert bench.skipped == {"turns": "fio is not installed"}
    assert bench.measures == {}
