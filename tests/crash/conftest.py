"""The process that serves the mounts of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import mounts

from .harness import Zygote


@pytest.fixture
def zygote(root: None) -> Iterator[Zygote]:
    if reason := mounts.why_no_fuse():
        pytest.skip(reason)
    with Zygote() as made:
        yield made
