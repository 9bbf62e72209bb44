"""The test suite. `tests.support` is its only importable part."""
