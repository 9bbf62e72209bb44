"""What `layerfs doctor` says, and that its advice about kernel options is true: the kernel is asked."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from layerfs.vfs.forms import scan_upper
from tests.support import mounts

from .conftest import Box


def report(box: Box, *arguments: str) -> dict[str, Any]:
    done = box.layerfs("doctor", "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


def test_machine(box: Box) -> None:
    said = report(box)
    assert said["usable"] is True and "upper" not in said
    assert said["machine"]["/dev/fuse"]["ok"] is True and said["machine"]["pyfuse3"]["ok"] is True
    assert ("root" in said["machine"]["user"]["text"]) == box.is_root
    done = box.layerfs("doctor")
    assert done.returncode == 0 and done.stderr == "" and "/dev/fuse" in done.stdout
    assert "\x1b" not in done.stdout


def test_upper_abilities(box: Box) -> None:
    before = os.stat(box("u")).st_mtime_ns
    upper = report(box, "--upper", box("u"))["upper"]
    assert upper["probe"]["prefix"] == ("trusted.overlay." if box.is_root else "user.overlay.")
    assert upper["probe"]["whiteout_device"] is True or not box.is_root
    assert upper["kernel_options"] == [] and upper["forms"] == {}
    assert os.listdir(box("u")) == [] and os.stat(box("u")).st_mtime_ns == before
    assert not [name for name in os.listdir(box.dir) if name.startswith(".layerfs")]


def test_an_upper_in_use_is_not_probed(box: Box) -> None:
    box.mount()
    upper = report(box, "--upper", box("u"))["upper"]
    assert upper["probe"] is None and "in use" in upper["problem"]
    box.umount()


def test_nothing_usable(user_box: Box) -> None:
    user_box.env["PATH"] = "/nowhere"
    done = user_box.layerfs("doctor", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["usable"] is False


# --- forms ----------------------------------------------------------------------------------------


def test_an_upper_made_by_layerfs_mounts_as_advised(root_box: Box) -> None:
    box = root_box
    if reason := mounts.why_no_kernel_overlay():
        pytest.skip(reason)
    for each in ("d", "e"):
        box.mkdir(f"a/{each}")
        (box.dir / f"a/{each}/file").write_text("x" * 100000)
    box.mkdir("k")

    def kernel() -> list[str]:
        options = report(box, "--upper", box("u"))["upper"]["kernel_options"]
        mounts.mount_overlay(box("k"), [box("a"), box("b")], box("u"), box("w"), options)
        try:
            box.run("chmod", "600", box("k/in-b"))
            found = sorted(name for _, dirs, files in os.walk(box("k")) for name in dirs + files)
            assert (
                box.dir / "k" / ("e2" if os.path.exists(box("k/e2")) else "e") / "file"
            ).stat().st_size == 100000
        finally:
            mounts.umount(box("k"))
        assert "file" in found
        return list(options)

    box.mount()
    assert box.run("rm", "-r", box("m/d"), box("m/in-a")).returncode == 0
    box.umount()
    assert kernel() == []
    box.mount()
    assert box.run("mv", box("m/e"), box("m/e2")).returncode == 0
    box.umount()
    assert kernel() == ["redirect_dir=on"]
    box.mount()
    assert box.run("chmod", "600", box("m/e2/file")).returncode == 0
    box.umount()
    assert kernel() == ["redirect_dir=on", "metacopy=on"]


def scanned(tmp_path: Path) -> tuple[dict[str, int], list[str] | None, list[str]]:
    forms = scan_upper(str(tmp_path))
    return dict(forms.counts), forms.kernel_options(), forms.obstacles()


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("trusted xattrs and devices are root's")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_text("")
    return tmp_path


def test_kernel_forms(upper: Path) -> None:
    os.setxattr(upper / "d", "trusted.overlay.opaque", b"y")
    os.setxattr(upper / "d", "trusted.overlay.origin", b"x")
    os.mknod(upper / "w", stat.S_IFCHR | 0o600, 0)
    assert scanned(upper) == ({"opaque": 1, "origin": 1, "whiteout-device": 1}, [], [])
    os.setxattr(upper / "d", "trusted.overlay.redirect", b"/x")
    assert scanned(upper)[1] == ["redirect_dir=on"]
    os.setxattr(upper / "d/f", "trusted.overlay.metacopy", b"")
    assert scanned(upper)[1] == ["redirect_dir=on", "metacopy=on"]


def test_user_forms(upper: Path) -> None:
    os.setxattr(upper / "d", "user.overlay.opaque", b"y")
    assert scanned(upper)[1] == ["userxattr"]
    os.setxattr(upper / "d", "user.overlay.redirect", b"x")
    assert scanned(upper)[1] is None and "redirect" in scanned(upper)[2][0]


def test_forms_that_the_kernel_does_not_know(upper: Path) -> None:
    (upper / ".wh.gone").touch()
    (upper / "d/.wh..wh..opq").touch()
    counts, options, obstacles = scanned(upper)
    assert counts == {"whiteout-file": 1, "opaque-file": 1} and options is None and len(obstacles) == 2


def test_both_prefixes_and_nested_and_foreign(upper: Path) -> None:
    os.setxattr(upper / "d", "trusted.overlay.overlay.opaque", b"y")
    assert scanned(upper) == ({"nested": 1}, [], [])
    os.setxattr(upper / "d", "trusted.overlay.impure", b"y")
    os.setxattr(upper / "d/f", "user.overlay.origin", b"y")
    assert scanned(upper)[1] is None
    os.setxattr(upper / "d/f", "user.fuseoverlayfs.opaque", b"y")
    assert any("fuse-overlayfs" in each for each in scanned(upper)[2])


def test_deeper_than_a_path_can_say(upper: Path) -> None:
    fd = os.open(upper, os.O_RDONLY)
    try:
        for _ in range(60):
            os.mkdir("n" * 100, dir_fd=fd)
            below = os.open("n" * 100, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.setxattr(fd, "trusted.overlay.redirect", b"x")
    finally:
        os.close(fd)
    assert scanned(upper)[0] == {"redirect": 1}
