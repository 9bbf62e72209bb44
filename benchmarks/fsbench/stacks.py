"""Makes the layer stacks that are measured, and knows what each mount of them must show. Mounts nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

FILES_PER_DIRECTORY = 10


@dataclass
class Stack:
    """Layers `layers/0` (top) to `layers/N-1` below `base`, and the merged tree they must make.

    Layers have short names and are mounted from within `layers`: 128 of them then fit into the one page that
    mount(2) passes on."""

    base: Path
    count: int
    contents: dict[str, bytes] = field(default_factory=dict)  # every file of the merged tree
    absent: list[str] = field(default_factory=list)  # names in existing directories that no layer has

    @property
    def layers(self) -> Path:
        return self.base / "layers"

    @property
    def names(self) -> list[str]:
        return [str(index) for index in range(self.count)]

    def add(self, layer: int, name: str) -> None:
        data = f"{name} of layer {layer}\n".encode()
        (self.layers / str(layer) / name).write_bytes(data)
        self.contents[name] = data

    def write_lists(self) -> None:
        """The lists that statmany reads."""
        (self.base / "present").write_bytes(_zero_ended(self.contents))
        (self.base / "absent").write_bytes(_zero_ended(self.absent))

    def remove(self) -> None:
        shutil.rmtree(self.base)


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
    stack.write_lists()
    return stack


def wide(base: Path, count: int, directories: int) -> Stack:
    """Each directory in one layer."""
    stack = _start(base, count)
    for number in range(directories):
        layer, directory = number % count, f"d{number:04}"
        (stack.layers / str(layer) / directory).mkdir()
        for file in range(FILES_PER_DIRECTORY):
            stack.add(layer, f"{directory}/file{file}")
            stack.absent.append(f"{directory}/absent{file}")
    stack.write_lists()
    return stack


def deep(base: Path, count: int, directories: int) -> Stack:
    """The same directories in every layer, their files shared out among them: as many files as in `wide`."""
    stack = _start(base, count)
    for number in range(directories):
        directory = f"d{number:04}"
        for name in stack.names:
            (stack.layers / name / directory).mkdir()
        for file in range(FILES_PER_DIRECTORY):
            stack.add((number * FILES_PER_DIRECTORY + file) % count, f"{directory}/file{file}")
            stack.absent.append(f"{directory}/absent{file}")
    stack.write_lists()
    return stack


SHAPES = {"wide": wide, "deep": deep}
