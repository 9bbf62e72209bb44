"""Makes the layer stacks that are measured, and knows what each mount of them must show. Mounts nothing."""

from __future__ import annotations

import filecmp
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .commands import BenchmarkError, run
from .measures import Sizes

FILES_PER_DIRECTORY = 10
_KEPT = 1 << 20  # bytes; larger files are not kept in memory


@dataclass
class Stack:
    """Layers `layers/0` (top) to `layers/N-1` below `base`, and the merged tree they must make.

    Layers have short names and are mounted from within `layers`: 128 of them then fit into the one page that
    mount(2) passes on."""

    base: Path
    count: int
    contents: dict[str, bytes] = field(default_factory=dict)  # files of the merged tree
    others: dict[str, int] = field(default_factory=dict)  # large files, links, devices: the size shown
    absent: list[str] = field(default_factory=list)  # names in existing directories that no layer has
    compared: int = (
        1  # the content of every n-th file is compared; 0: the jobs themselves check what they see
    )

    @property
    def layers(self) -> Path:
        return self.base / "layers"

    @property
    def names(self) -> list[str]:
        return [str(index) for index in range(self.count)]

    @property
    def probe(self) -> str:
        """What answers a stat when a mount is usable: a file of the lowest layer."""
        return next(reversed(self.contents))

    @property
    def directories(self) -> set[str]:
        """Those that hold a file, directly."""
        return {os.path.dirname(name) for name in self.contents}

    def add(self, layer: int, name: str, data: bytes | None = None) -> None:
        if data is None:
            data = f"{name} of layer {layer}\n".encode()
        path = self.layers / str(layer) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.contents[name] = data

    def write_lists(self) -> None:
        """The lists that `many` reads."""
        (self.base / "present").write_bytes(_zero_ended(self.contents))
        (self.base / "absent").write_bytes(_zero_ended(self.absent))

    def check(self, mnt: Path) -> None:
        """Reads all below `mnt`. Raises BenchmarkError, at the first name that is not as it must be."""
        if not self.compared:
            return
        shown: dict[str, int] = {}
        for path in _walk(mnt):
            shown[str(path.relative_to(mnt))] = path.lstat().st_size
        right = {**{name: len(data) for name, data in self.contents.items()}, **self.others}
        if shown.keys() != right.keys():
            lacking, more = right.keys() - shown.keys(), shown.keys() - right.keys()
            raise BenchmarkError(f"{len(lacking)} names missing, {len(more)} too many")
        for name, size in right.items():
            if shown[name] != size:
                raise BenchmarkError(f"{name}: {shown[name]} bytes in place of {size}")
        for name, data in list(self.contents.items())[:: self.compared]:
            if (mnt / name).read_bytes() != data:
                raise BenchmarkError(f"{name}: wrong content")
        for name in self.others:
            paths = (self.layers / layer / name for layer in self.names)
            lower = next(path for path in paths if os.path.lexists(path))
            if stat.S_ISREG(lower.lstat().st_mode) and not filecmp.cmp(lower, mnt / name, shallow=False):
                raise BenchmarkError(f"{name}: wrong content")

    @contextmanager
    def sealed(self) -> Iterator[None]:
        """Nobody can change the layers: some would, and the others would be measured on something else."""
        run(["mount", "--bind", self.layers, self.layers])
        try:
            run(["mount", "-o", "remount,bind,ro", self.layers])
            yield
        finally:
            run(["umount", "-l", self.layers])  # a daemon that hangs may still hold it


def _zero_ended(names: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(name) + b"\0" for name in names)


def _start(base: Path, count: int) -> Stack:
    stack = Stack(base, count)
    for name in stack.names:
        (stack.layers / name).mkdir(parents=True)
    return stack


def mixed(base: Path, count: int, files: int) -> Stack:
    """Root-like: 50 files in a directory; every second directory in one layer, the others in all of them."""
    stack = _start(base, count)
    for number in range(files // 50):
        directory = f"d{number:04}"
        holders = range(count) if number % 2 == 0 else (number % count,)
        for layer in holders:
            (stack.layers / str(layer) / directory).mkdir()
        for file in range(50):
            stack.add(holders[file % len(holders)], f"{directory}/file{file:02}")
            stack.absent.append(f"{directory}/absent{file:02}")
    return stack


def flat(base: Path, count: int, files: int) -> Stack:
    """One directory that all layers share."""
    stack = _start(base, count)
    for number in range(files):
        stack.add(number % count, f"all/file{number:05}")
    return stack


def big(base: Path, count: int, size: int) -> Stack:
    """One large file in the lowest of the layers, and a small one beside it."""
    stack = _start(base, count)
    stack.add(count - 1, "small")
    block = os.urandom(1 << 20)  # nothing that a file system could store shorter
    with open(stack.layers / str(count - 1) / "big", "wb") as file:
        for _ in range(size >> 20):
            file.write(block)
    stack.others["big"] = size
    return stack


def numerous(base: Path, count: int, files: int) -> Stack:
    """Empty files, 500 to a directory, each directory in one layer."""
    stack = _start(base, count)
    stack.compared = 0
    for number in range(files // 500):
        directory = f"d{number:04}"
        for file in range(500):
            stack.add(number % count, f"{directory}/file{file:03}", b"")
    return stack


def wide(base: Path, count: int, directories: int) -> Stack:
    """Each directory in one layer."""
    stack = _start(base, count)
    stack.compared = 10
    for number in range(directories):
        directory = f"d{number:04}"
        for file in range(FILES_PER_DIRECTORY):
            stack.add(number % count, f"{directory}/file{file}")
            stack.absent.append(f"{directory}/absent{file}")
    return stack


def deep(base: Path, count: int, directories: int) -> Stack:
    """The same directories in every layer, their files shared out among them: as many files as in `wide`."""
    stack = _start(base, count)
    stack.compared = 10
    for number in range(directories):
        directory = f"d{number:04}"
        for name in stack.names:
            (stack.layers / name / directory).mkdir()
        for file in range(FILES_PER_DIRECTORY):
            stack.add((number * FILES_PER_DIRECTORY + file) % count, f"{directory}/file{file}")
            stack.absent.append(f"{directory}/absent{file}")
    return stack


def shared_out(base: Path, count: int, tree: Path) -> Stack:
    """The files of `tree`, which is emptied: those of one directory into one layer, which one depends on the
    directory's name. Times stay."""
    stack = _start(base, count)

    def home(directory: Path) -> Path:
        layer = zlib.crc32(bytes(directory)) % count
        return stack.layers / str(layer) / directory

    for where, _, _ in os.walk(tree):
        home(Path(where).relative_to(tree)).mkdir(parents=True, exist_ok=True)
    for path in list(_walk(tree)):
        path.rename(home(path.parent.relative_to(tree)) / path.name)
    for layer in range(count):
        _take_in(stack, layer)
    shutil.rmtree(tree)
    return stack


def as_it_is(base: Path) -> Stack:
    """One layer that somebody else has filled: `base/layers/0`."""
    stack = Stack(base, 1)
    _take_in(stack, 0)
    return stack


def _take_in(stack: Stack, layer: int) -> None:
    root = stack.layers / str(layer)
    for path in _walk(root):
        found, inside = path.lstat(), str(path.relative_to(root))
        if stat.S_ISREG(found.st_mode) and found.st_size <= _KEPT:
            stack.contents[inside] = path.read_bytes()
        else:
            stack.others[inside] = found.st_size


def _walk(top: Path) -> Iterator[Path]:
    """All but directories; os.walk counts links to directories among these."""
    for where, directories, names in os.walk(top):
        yield from (Path(where, name) for name in names)
        yield from (path for name in directories if (path := Path(where, name)).is_symlink())


#: By the first word of a stack's name; `Group.stacks` lists names like "mixed" or "deep 32".
MAKERS: dict[str, Callable[[Path, Sizes, int], Stack]] = {
    "mixed": lambda base, sizes, _: mixed(base, sizes.layers, sizes.files),
    "flat": lambda base, sizes, _: flat(base, sizes.layers, sizes.listed),
    "big": lambda base, sizes, _: big(base, sizes.layers, sizes.big),
    "numerous": lambda base, sizes, files: numerous(base, sizes.layers, files),
    "wide": lambda base, sizes, count: wide(base, count, sizes.shape_directories),
    "deep": lambda base, sizes, count: deep(base, count, sizes.shape_directories),
}
