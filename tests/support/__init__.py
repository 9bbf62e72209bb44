"""Shared by the tests: stacks of directories, ways to mount them, tree snapshots. No tests in here."""
