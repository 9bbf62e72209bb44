"""Conformance: what POSIX and Linux promise of a directory, asked of a plain one, kernel overlayfs and
layerfs."""

import pytest

pytest.register_assert_rewrite("tests.posix.place")
