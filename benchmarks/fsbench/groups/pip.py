"""pip install of wheels that were made here: no network, the same on every machine."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from ..caches import drop_names
from ..commands import BenchmarkError
from ..contenders import Contender
from ..measures import Sizes
from ..rounds import Bench
from ..stacks import Stack
from .group import Group

_WHEELS = 10
_NO_CONFIG = {"PIP_CONFIG_FILE": "/dev/null"}


class Pip(Group):
    """The whole of pip: it unpacks, compiles to bytecode, and writes records."""

    name = "pip"

    def rounds(self, sizes: Sizes) -> int:
        return sizes.slow_rounds

    def prepare(self, scratch: Path, sizes: Sizes) -> None:
        if subprocess.run([sys.executable, "-c", "import pip"], capture_output=True, check=False).returncode:
            raise BenchmarkError(f"{sys.executable} has no pip (run with .venv/bin/python)")
        (scratch / "wheels").mkdir()
        for number in range(_WHEELS):
            make_wheel(scratch / "wheels", f"bench_{number}", sizes.worked // 3 // _WHEELS)

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        names, modules = [f"bench-{number}" for number in range(_WHEELS)], bench.sizes.worked // 3
        with bench.place(contender, stack, own_disk=True) as place:
            prefix = place.mnt / "prefix"

            def check() -> None:
                site = next(prefix.glob("**/bench_0"), prefix / "nowhere").parent
                for package in range(_WHEELS):
                    code = f"import bench_{package}.module0 as one; print(one.value(2))"
                    if (
                        place.said(sys.executable, "-c", code, variables={"PYTHONPATH": str(site)}).strip()
                        != "2"
                    ):
                        raise BenchmarkError("pip: what was installed does not work")
                found = sum(1 for _ in site.glob("bench_*/module*.py"))
                if found != modules // _WHEELS * _WHEELS:
                    raise BenchmarkError(f"pip: {found} modules installed in place of {modules}")

            command: list[str | Path] = [
                sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-cache-dir", "--no-deps",
                "--disable-pip-version-check", "--root-user-action=ignore", "--find-links",
                bench.scratch / "wheels", "--prefix", prefix, *names,
            ]  # fmt: skip
            title = f"pip install of {_WHEELS} wheels, {modules:,} modules"
            drop_names()
            place.time(
                "pip",
                title,
                1,
                lambda: place.program(*command, variables=_NO_CONFIG),
                check,
                unit="ms",
            )


def make_wheel(directory: Path, name: str, modules: int) -> None:
    """A wheel of one package with as many modules, each of some twenty lines."""
    info = f"{name}-1.0.dist-info"
    files = {f"{name}/__init__.py": ""}
    for number in range(modules):
        lines = "".join(f"def f{n}(x: int) -> int:\n    return x + {n * number}\n\n\n" for n in range(5))
        files[f"{name}/module{number}.py"] = f"{lines}def value(x: int) -> int:\n    return f0(x)\n"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: bench\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    rows = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text.encode())}\n")
    files[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\n"])
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
