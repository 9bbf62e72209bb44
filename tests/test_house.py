"""The rule of imports: a package of layerfs imports only from rows below its own (DESIGN, layout)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import layerfs

ROWS = [
    {"cli"},
    {"fuse", "runtime"},
    {"vfs", "control", "registry"},
    {"upper", "oci"},
    {"stack", "gate", "inodes"},
    {"overlay"},
    {"errors", "ids", "fdutil"},
]
ROW = {package: number for number, row in enumerate(ROWS) for package in row}
#: Modules at the top that belong to no row: the version, and the entry point.
OUTSIDE = {"__init__", "__main__"}

HOME = Path(layerfs.__file__).parent
MODULES = sorted(path.relative_to(HOME) for path in HOME.rglob("*.py"))


def package_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imported(module: Path) -> Iterator[tuple[int, str]]:
    """Line and package of every import of layerfs in `module`, those inside functions included."""
    for node in ast.walk(ast.parse((HOME / module).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "layerfs" and len(parts) > 1 and parts[1] != "__version__":
                yield node.lineno, parts[1]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down(module: Path) -> None:
    own = package_of(module)
    if own in OUTSIDE:
        return
    assert own in ROW, f"{own} has no row"
    for line, other in imported(module):
        assert other == own or ROW[other] > ROW[own], f"layerfs/{module}:{line}: {own} imports {other}"
