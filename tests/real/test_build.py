"""A C project is built with make -j on the mount, changed and built again: times must tell make the truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Place, run

pytestmark = [pytest.mark.long, pytest.mark.root, pytest.mark.timeout(600)]

UNITS = 60

MAKEFILE = """\
CFLAGS = -O1 -Wall -Werror -MMD -Iinclude
SOURCES := $(wildcard src/*.c)
OBJECTS := $(SOURCES:src/%.c=build/%.o)
program: $(OBJECTS) build/libhalf.a
\t$(CC) -o $@.new $(OBJECTS) && mv $@.new $@
build/libhalf.a: $(wordlist 1,30,$(OBJECTS))
\trm -f $@ && ar rcs $@ $^
build/%.o: src/%.c | build
\t$(CC) $(CFLAGS) -c -o $@ $<
build:
\tmkdir -p build
install: program
\tinstall -D -m 755 program $(DESTDIR)/usr/bin/program
\tln -sf program $(DESTDIR)/usr/bin/alias
clean:
\trm -rf build program
-include $(wildcard build/*.d)
"""


def write_project(top: Path) -> int:
    """Returns what the program must print."""
    (top / "src").mkdir()
    (top / "include").mkdir()
    (top / "Makefile").write_text(MAKEFILE)
    for number in range(UNITS):
        header(top, number, number)
        (top / f"src/unit{number}.c").write_text(
            f'#include "unit{number}.h"\n#include <stdio.h>\n'
            f"int unit{number}(void) {{ return VALUE{number}; }}\n"
        )
    includes = "".join(f'#include "unit{number}.h"\n' for number in range(UNITS))
    total = " + ".join(f"unit{number}()" for number in range(UNITS))
    (top / "src/main.c").write_text(
        f'{includes}#include <stdio.h>\nint main(void) {{ printf("%d\\n", {total}); return 0; }}\n'
    )
    return sum(range(UNITS))


def header(top: Path, number: int, value: int) -> None:
    text = f"#define VALUE{number} {value}\nint unit{number}(void);\n"
    (top / f"include/unit{number}.h").write_text(text)


def make(top: Path, *words: str) -> list[str]:
    """Names of the sources that were compiled."""
    said = run(["make", "-j4", *words], cwd=top).stdout
    compilations = [line.split() for line in said.splitlines() if " -c " in line]
    return sorted(word[4:] for words in compilations for word in words if word.startswith("src/"))


def test_make_in_parallel_and_again(
    place: Place, needs: Callable[..., None], layer: Callable[[], Path]
) -> None:
    needs("make", "cc", "ar")
    lower = layer()
    expected = write_project(lower)
    mounted = place(lower)
    top = mounted.mnt
    program = top / "program"

    assert len(make(top)) == UNITS + 1
    assert run([program]).stdout == f"{expected}\n"
    assert make(top) == []

    header(top, 7, 1007)  # it was the lower layer's
    assert make(top) == ["main.c", "unit7.c"]
    assert run([program]).stdout == f"{expected + 1000}\n"

    mounted.remount()
    assert make(top) == []  # the times of all files are what they were
    assert run([program]).stdout == f"{expected + 1000}\n"

    (top / "src").rename(top / "old")
    (top / "old").rename(top / "src")
    (top / "src/unit3.c").touch()
    assert make(top) == ["unit3.c"]
    make(top, "install", f"DESTDIR={top}/out")
    assert run([top / "out/usr/bin/alias"]).stdout == f"{expected + 1000}\n"
    make(top, "clean")
    assert not (top / "build").exists() and not program.exists()
    assert len(make(top)) == UNITS + 1
