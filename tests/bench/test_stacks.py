"""What is measured on: layers make the tree that is expected, and a mount that shows another is found out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fsbench import stacks
from benchmarks.fsbench.commands import BenchmarkError
from benchmarks.fsbench.stacks import Stack

MAKERS: dict[str, Callable[[Path], Stack]] = {
    "mixed": lambda base: stacks.mixed(base, 3, 200),
    "flat": lambda base: stacks.flat(base, 3, 40),
    "wide": lambda base: stacks.wide(base, 3, 5),
    "deep": lambda base: stacks.deep(base, 3, 5),
    "big": lambda base: stacks.big(base, 3, 2 << 20),
}


def merged(stack: Stack, to: Path) -> Path:
    """As cp makes it, the lowest layer first."""
    for name in reversed(stack.names):
        shutil.copytree(stack.layers / name, to, symlinks=True, dirs_exist_ok=True)
    return to


@pytest.mark.parametrize("kind", MAKERS)
def test_layers_make_the_tree(kind: str, tmp_path: Path) -> None:
    stack = MAKERS[kind](tmp_path / "stack")
    shown = merged(stack, tmp_path / "shown")
    stack.check(shown)
    for name in stack.absent:
        assert not (shown / name).exists()
        assert (shown / name).parent.is_dir()


def test_deep_is_as_large_as_wide(tmp_path: Path) -> None:
    wide, deep = MAKERS["wide"](tmp_path / "wide"), MAKERS["deep"](tmp_path / "deep")
    assert wide.contents.keys() == deep.contents.keys()
    assert all((deep.layers / layer / name).is_dir() for layer in deep.names for name in deep.directories)
    assert all(
        sum((wide.layers / layer / name).is_dir() for layer in wide.names) == 1 for name in wide.directories
    )


def _other_content(shown: Path) -> None:
    (shown / "d0001" / "file07").write_text("d0001/file07 of layer 9\n")


def _lost(shown: Path) -> None:
    (shown / "d0001" / "file07").unlink()


def _more(shown: Path) -> None:
    (shown / "d0001" / "ghost").touch()


def _shorter(shown: Path) -> None:
    (shown / "d0001" / "file07").write_text("")


def test_a_large_file_is_compared_whole(tmp_path: Path) -> None:
    stack = MAKERS["big"](tmp_path / "stack")
    shown = merged(stack, tmp_path / "shown")
    with open(shown / "big", "r+b") as file:
        file.seek(1_500_000)
        file.write(b"other")
    with pytest.raises(BenchmarkError, match="big: wrong content"):
        stack.check(shown)


@pytest.mark.parametrize("spoil", [_other_content, _lost, _more, _shorter])
def test_what_is_wrong_is_found(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    stack = MAKERS["mixed"](tmp_path / "stack")
    shown = merged(stack, tmp_path / "shown")
    spoil(shown)
    with pytest.raises(BenchmarkError, match=r"file07|names missing"):
        stack.check(shown)


def test_a_tree_is_shared_out_whole(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(20):
        (tree / f"d{number}" / "empty").mkdir(parents=True)
        (tree / f"d{number}" / "file").write_text(str(number))
        (tree / f"d{number}" / "link").symlink_to("file")
        (tree / f"d{number}" / "there").symlink_to("empty")
    shutil.copytree(tree, tmp_path / "copy", symlinks=True)
    stack = stacks.shared_out(tmp_path / "stack", 4, tree)
    assert not tree.exists()
    assert sum(1 for name in stack.names if any((stack.layers / name).iterdir())) > 1
    stack.check(tmp_path / "copy")
    shown = merged(stack, tmp_path / "shown")
    stack.check(shown)
    assert sorted(shown.rglob("*")) == [
        shown / path.relative_to(tmp_path / "copy") for path in sorted((tmp_path / "copy").rglob("*"))
    ]
