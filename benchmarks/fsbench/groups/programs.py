"""Whole jobs of programs that read much of a tree: a Python that starts, git status, make."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ..caches import drop_names
from ..commands import BenchmarkError, run
from ..contenders import Contender
from ..measures import Sizes
from ..rounds import Bench
from ..stacks import Stack, shared_out
from .group import Group, lacking

_LEFT_OUT = ("test", "tests", "idlelib", "tkinter", "site-packages", "dist-packages", "ensurepip", "config-*")
_MODULES = "asyncio, email.message, http.client, json, logging.config, multiprocessing.pool, unittest.mock"
_MODULES += ", xml.etree.ElementTree, zipfile, argparse, decimal, difflib, concurrent.futures"


class Program(Group):
    def rounds(self, sizes: Sizes) -> int:
        return sizes.slow_rounds


class Python(Program):
    """The interpreter and its library lie in the layers; the shared libraries are the host's."""

    name = "python"
    stack = "python"

    def make(self, base: Path, sizes: Sizes) -> Stack:
        tree, library = base / "tree", Path(sysconfig.get_path("stdlib"))
        ignored = shutil.ignore_patterns(*_LEFT_OUT, "*.a")
        shutil.copytree(library, tree / "lib" / library.name, symlinks=True, ignore=ignored)
        (tree / "bin").mkdir()
        shutil.copy2(Path(sys.executable).resolve(), tree / "bin" / "python3")
        return shared_out(base, sizes.layers, tree)

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        with bench.place(contender, stack) as place:
            program = place.mnt / "bin" / "python3"
            variables = {"PYTHONHOME": str(place.mnt), "PYTHONDONTWRITEBYTECODE": "1"}

            def check() -> None:
                code = "import json; print(json.__file__)"
                if not place.said(program, "-c", code, variables=variables).startswith(str(place.mnt)):
                    raise BenchmarkError("python: its library was not the one in the mount")

            drop_names()
            for how in ("cold", "warm"):
                place.time(
                    f"{how}_python", f"{how} python -c 'import asyncio, email.message, …'", 1,
                    lambda: place.program(program, "-c", f"import {_MODULES}", variables=variables),
                    check if how == "warm" else None, unit="ms",
                )  # fmt: skip


class Git(Program):
    """A packed repository and its work tree in the layers, both as git left them."""

    name = "git"
    stack = "git"

    def prepare(self, scratch: Path, sizes: Sizes) -> None:
        lacking("git")

    def make(self, base: Path, sizes: Sizes) -> Stack:
        tree = base / "tree"
        for number in range(sizes.worked):
            path = tree / f"part{number // 400}" / f"d{number // 20 % 20}" / f"source{number % 20}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"source {number}\n" * (number % 97 + 1))
        own = ["-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0"]
        for words in (["init", "-q"], ["add", "-A"], [*own, "commit", "-q", "-m", "all"], ["gc", "-q"]):
            run(["git", *words], cwd=tree, env=_git())
        return shared_out(base, sizes.layers, tree)

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        output = bench.scratch / "status"

        def check() -> None:
            if output.stat().st_size:
                raise BenchmarkError(f"git status: {output.read_text().splitlines()[0]}")

        with bench.place(contender, stack, own_disk=True) as place:

            def take() -> float:
                return place.program("git", "status", "--porcelain", output=output, variables=_git())

            drop_names()
            for how, what in (("cold", "cold git status"), ("warm", "git status again")):
                title = f"{what}, {bench.sizes.worked:,} files"
                place.time(f"{how}_git", title, 1, take, check, unit="ms")


def _git() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}


class Build(Program):
    """C sources and their headers in the layers; objects and the program go beside them."""

    name = "make"
    stack = "project"

    def prepare(self, scratch: Path, sizes: Sizes) -> None:
        lacking("make", "gcc")

    def make(self, base: Path, sizes: Sizes) -> Stack:
        tree, sources = base / "tree", sizes.worked // 50
        (tree / "include").mkdir(parents=True)
        headers = "".join(f'#include "h{number}.h"\n' for number in range(40))
        for number in range(40):
            (tree / "include" / f"h{number}.h").write_text(f"#pragma once\nint part{number}(int);\n" * 20)
        for number in range(sources):
            (tree / f"s{number}.c").write_text(f"{headers}int f{number}(void) {{ return {number}; }}\n")
        calls = " + ".join(f"f{number}()" for number in range(sources))
        declared = "".join(f"int f{number}(void);\n" for number in range(sources))
        code = f'#include <stdio.h>\n{declared}int main(void) {{ printf("%d\\n", {calls}); }}\n'
        (tree / "main.c").write_text(code)
        (tree / "Makefile").write_text(
            "OBJECTS := $(patsubst %.c,%.o,$(wildcard *.c))\nCFLAGS := -Iinclude\n"
            "program: $(OBJECTS)\n\tgcc -o $@ $^\n"
        )
        return shared_out(base, sizes.layers, tree)

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        sources = bench.sizes.worked // 50
        with bench.place(contender, stack, own_disk=True) as place:

            def check() -> None:
                said = subprocess.run([place.mnt / "program"], capture_output=True, text=True, check=False)
                if said.stdout.strip() != str(sum(range(sources))):
                    raise BenchmarkError(f"the program that was built says {said.stdout!r}")

            drop_names()
            title = f"make -j2 of {sources + 1} C files"
            place.time("make", title, 1, lambda: place.program("make", "-s", "-j2"), check, unit="ms")
