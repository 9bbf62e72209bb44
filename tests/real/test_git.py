"""git on the mount: a repository that the test makes is cloned, committed to, packed and checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Place, run

pytestmark = [pytest.mark.long, pytest.mark.root, pytest.mark.timeout(600)]

ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "LC_ALL": "C",
} | {name: os.environ[name] for name in ("LAYERFS_TEST_SESSION",) if name in os.environ}


def git(where: Path, *words: str | Path) -> str:
    # gc in the background would outlive the test
    quiet = ["-c", "gc.autoDetach=false", "-c", "protocol.file.allow=always", "-c", "safe.directory=*"]
    return run(["git", *quiet, *words], cwd=where, env=ENVIRONMENT).stdout


def fill(repository: Path) -> None:
    git(repository, "init", "-q", "-b", "main")
    for number in range(300):
        path = repository / f"dir{number % 20:02}" / f"file{number:03}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{number}\n" * (number % 50 + 1))
    (repository / "link").symlink_to("dir00/file000.txt")
    (repository / "tool").write_text("#!/bin/sh\n")
    (repository / "tool").chmod(0o755)
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "first")
    for number in range(5, 300, 10):
        (repository / f"dir{number % 20:02}" / f"file{number:03}.txt").write_text("changed\n")
    git(repository, "commit", "-q", "-am", "second")
    git(repository, "branch", "old", "HEAD~1")


def check(repository: Path) -> None:
    assert git(repository, "fsck", "--full", "--strict", "--no-dangling") == ""
    assert git(repository, "status", "--porcelain") == ""


def test_clone_commit_fsck(place: Place, needs: Callable[..., None], layer: Callable[[], Path]) -> None:
    """A clone made on the mount, and work in the lower layer's own working tree, which git then rewrites."""
    needs("git")
    lower = layer()
    origin = lower / "origin"
    origin.mkdir()
    fill(origin)
    mounted = place(lower)
    origin, clone = mounted.mnt / "origin", mounted.mnt / "clone"
    check(origin)  # nothing looks changed because of the mount
    git(mounted.mnt, "clone", "-q", origin, clone)
    check(clone)
    for repository in (clone, origin):
        git(repository, "checkout", "-q", "-b", "work", "main")
        git(repository, "mv", "dir03", "moved")
        git(repository, "rm", "-rq", "dir04")
        (repository / "moved" / "new.txt").write_text("new\n")
        git(repository, "add", "-A")
        git(repository, "commit", "-q", "-m", f"work in {repository.name}")
        check(repository)
        for branch in ("main~1", "work", "main", "work"):
            git(repository, "checkout", "-q", branch)
            check(repository)
        git(repository, "stash", "list")
        git(repository, "rebase", "-q", "--onto", "main~1", "main", "work", "-X", "theirs")
        git(repository, "checkout", "-q", "main")
        git(repository, "merge", "-q", "-m", "merge", "work", "-X", "ours")
        git(repository, "gc", "-q", "--prune=now")
        check(repository)
    git(clone, "fetch", "-q", "origin")
    heads = git(clone, "rev-parse", "main", "work")
    log = git(clone, "log", "--format=%H %s", "--all")
    mounted.remount()
    check(clone)
    check(origin)
    assert git(clone, "rev-parse", "main", "work") == heads
    assert git(clone, "log", "--format=%H %s", "--all") == log
    git(mounted.mnt, "clone", "-q", "--no-hardlinks", clone, "again")
    check(mounted.mnt / "again")
