"""The core, compiled under ASan and UBSan, and pairs of it and its twin over real directories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gate import driver
from tests.gate.pair import Pair


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver's program."""
    return driver.build(tmp_path_factory.mktemp("gate") / "driver", _compiler())


@pytest.fixture(scope="session")
def plain_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without sanitizers: it takes the memory that it takes in a mount."""
    return driver.build(tmp_path_factory.mktemp("gate") / "plain", _compiler(), ("-O2",))


def _compiler() -> str:
    found = driver.compiler()
    if found is None:
        pytest.skip("no C compiler here ($CC, gcc)")
    return found


@pytest.fixture
def make_pair(core: Path, tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(**options: object) -> Pair:
        base = tmp_path / f"pair{len(made)}"
        base.mkdir()
        made.append(Pair(core, base, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()
