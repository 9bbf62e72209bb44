"""A reader holds a lower file open, or mapped, while a writer changes it.

Each scenario runs on a plain directory and on layerfs and must see the same; the lower layers stay byte for
byte what they were. The writer is another process, so that only the file system tells the reader.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.stack import OLD_NS, Dir, File, Hardlink, Stack, Symlink, Tree
from tests.support.tree import lowers_guard

from .conftest import Box, err, make_canary

SIZE = 3 * mmap.PAGESIZE + 100
DATA = bytes(i % 251 for i in range(SIZE))
BIG = 1 << 20

TREE: Tree = {
    "d": Dir(),
    "d/f": File(data=DATA),
    "d/linked": File(data=DATA),
    "d/sibling": Hardlink("d/linked"),
    "d/other": File(data=b"other " * 1000),
    "d/big": File(data=DATA, size=BIG),
    "d/symlink": Symlink(target="f"),
    "d/mode": File(data=DATA, mode=0o600),
}


def run(code: str, *arguments: object) -> None:
    """Another process does it. `p` is its list of arguments."""
    prelude = "import mmap, os, sys\np = sys.argv[1:]\n"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", prelude + code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


#: What the writer does to `d/f`. The paths are those in the mounted tree.
WRITERS: dict[str, str] = {
    "write": "fd = os.open(p[0], os.O_WRONLY); os.pwrite(fd, b'NEW', 10); os.close(fd)",
    "write and sync": "fd = os.open(p[0], os.O_RDWR | os.O_SYNC); os.pwrite(fd, b'NEW', 4096); os.fsync(fd)",
    "append": "fd = os.open(p[0], os.O_WRONLY | os.O_APPEND); os.write(fd, b'APPENDED' * 1000)",
    "cut": "os.truncate(p[0], 5000)",
    "cut to nothing": "os.truncate(p[0], 0)",
    "O_TRUNC and write": "fd = os.open(p[0], os.O_WRONLY | os.O_TRUNC); os.write(fd, b'fresh' * 2000)",
    "grow": "os.truncate(p[0], 40000)",
    "store": (
        "fd = os.open(p[0], os.O_RDWR)\n"
        "m = mmap.mmap(fd, 0)\nm[20:25] = b'STORE'\nm[4096:4101] = b'STORE'\nm.flush()\nm.close()"
    ),
    "store, closed first": (
        "fd = os.open(p[0], os.O_RDWR)\nm = mmap.mmap(fd, 0)\nos.close(fd)\nm[20:25] = b'STORE'\nm.close()"
    ),
    "rename over": "os.rename(p[1], p[0])",
    "unlink": "os.unlink(p[0])",
    "unlink and make anew": "os.unlink(p[0]); open(p[0], 'wb').write(b'anew' * 3000)",
    "rename away and write": (
        "os.rename(p[0], p[0] + '.moved')\n"
        "fd = os.open(p[0] + '.moved', os.O_WRONLY); os.pwrite(fd, b'MOVED', 0)"
    ),
    "chmod": "os.chmod(p[0], 0o4711)",
    "chmod, then write": "os.chmod(p[0], 0o640)\nfd = os.open(p[0], 1); os.pwrite(fd, b'AFTER', 100)",
    "chown and times": "os.chown(p[0], 5, 6); os.utime(p[0], (1, 2))",
    "xattr": "os.setxattr(p[0], 'user.new', b'value')",
    "link and write": (
        "os.link(p[0], p[0] + '.link')\nfd = os.open(p[0] + '.link', 1); os.pwrite(fd, b'LINK', 50)"
    ),
    "parent renamed, then write": (
        "d = os.path.dirname(p[0])\nos.rename(d, d + '.moved')\n"
        "fd = os.open(d + '.moved/' + os.path.basename(p[0]), os.O_WRONLY); os.pwrite(fd, b'UNDER', 50)"
    ),
}


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, Path]]:
    """A plain directory and a layerfs over lowers only, each with one copy of TREE for each writer."""
    if reason := mounts.why_not_root() or mounts.why_no_layerfs():
        pytest.skip(reason)
    stack, plain = Stack(n_lowers=3), Stack()
    make_canary(stack.dir / "canary")
    for number, name in enumerate([*WRITERS, "sibling", "bind", "reopen", "late"]):
        stack.write(stack.lowers[number % 3], TREE, name.replace(" ", "-"))
        plain.write(plain.mnt, TREE, name.replace(" ", "-"))
    with lowers_guard(stack.lowers), mounts.Layerfs(stack) as m:
        yield {"plain": plain.mnt, "layerfs": m.mnt}
    shutil.rmtree(plain.dir)
    shutil.rmtree(stack.dir)


class Reader:
    """Holds a file in every way: descriptors, a private and a shared mapping, partly touched before."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.second = os.open(path, os.O_RDONLY)
        self.o_path = os.open(path, os.O_PATH)
        self.shared = mmap.mmap(self.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self.private = mmap.mmap(self.fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        self.private[0:5] = b"mine!"  # a page of its own from now on
        self.touched = self.shared[0:10] + self.shared[4096:4106]
        os.read(self.second, 100)

    def observe(self, path: Path) -> dict[str, object]:
        """All that the reader can see now. Pages beyond a shorter file's end would be SIGBUS: not touched."""
        size = os.fstat(self.fd).st_size
        seen: dict[str, object] = {
            "read": os.pread(self.fd, 1 << 20, 0),
            "second goes on": os.read(self.second, 1 << 20),
            "attributes": _attributes(self.fd),
            "through O_PATH": _attributes(self.o_path),
            "by name": _by_name(path),
        }
        whole = min(size, SIZE)
        seen["shared"] = self.shared[:whole]
        seen["private, untouched pages"] = self.private[mmap.PAGESIZE : whole]
        seen["private, own page"] = self.private[: min(whole, mmap.PAGESIZE)][:5]
        seen["O_PATH reopened"] = _reopened(self.o_path)
        seen["reopened"] = _reopened(self.fd)
        return seen

    def close(self) -> None:
        self.shared.close()
        self.private.close()
        for fd in (self.fd, self.second, self.o_path):
            os.close(fd)


def _attributes(fd: int) -> tuple[object, ...]:
    st = os.fstat(fd)
    recent = st.st_mtime_ns if st.st_mtime_ns < 10**18 else "recent"
    return (oct(st.st_mode), st.st_uid, st.st_gid, st.st_size, st.st_nlink, recent)


def _by_name(path: Path) -> object:
    try:
        return path.read_bytes()
    except OSError as error:
        return error.errno


def _reopened(fd: int) -> object:
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    except OSError as error:
        return error.errno
    try:
        return os.pread(again, 1 << 20, 0)
    finally:
        os.close(again)


def compare(places: dict[str, Path], scenario: Callable[[Path], dict[str, object]]) -> None:
    plain, layerfs = (scenario(places[name]) for name in ("plain", "layerfs"))
    different = {
        key: (_brief(plain[key]), _brief(layerfs[key])) for key in plain if plain[key] != layerfs[key]
    }
    assert not different, f"(plain, layerfs): {different}"


def _brief(value: object) -> object:
    if isinstance(value, bytes) and len(value) > 60:
        return value[:25], "...", len(value), value[-10:]
    return value


@pytest.mark.parametrize("writer", WRITERS)
def test_reader_holds_a_lower_file(places: dict[str, Path], writer: str) -> None:
    def scenario(root: Path) -> dict[str, object]:
        here = root / writer.replace(" ", "-") / "d"
        reader = Reader(here / "f")
        try:
            run(WRITERS[writer], here / "f", here / "other")
            if not here.exists():
                here = here.with_name("d.moved")
            seen = reader.observe(here / "f")
            # Descriptor and name are one file, or both say that they are not.
            if (here / "f").exists():
                held, named = os.fstat(reader.fd), os.stat(here / "f")
                seen["same inode"] = (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)
            return seen
        finally:
            reader.close()

    compare(places, scenario)


def test_writer_takes_the_name_of_a_hard_link(places: dict[str, Path]) -> None:
    def scenario(root: Path) -> dict[str, object]:
        here = root / "sibling" / "d"
        reader = Reader(here / "linked")
        try:
            run("fd = os.open(p[0], os.O_WRONLY); os.pwrite(fd, b'SIBLING', 5)", here / "sibling")
            seen = reader.observe(here / "linked")
            run("os.unlink(p[0])", here / "sibling")
            seen |= {f"after unlink: {key}": value for key, value in reader.observe(here / "linked").items()}
            return seen
        finally:
            reader.close()

    compare(places, scenario)


def test_through_bind_mounts(places: dict[str, Path], make_stack: type[Stack]) -> None:
    """The file and its directory are bind-mounted elsewhere; reader and writer go through different ones."""
    box = make_stack()

    def scenario(root: Path) -> dict[str, object]:
        here = root / "bind" / "d"
        on_file, on_dir = box.dir / "bound-file", box.dir / "bound-dir"
        on_file.touch()
        on_dir.mkdir(exist_ok=True)
        mounts.bind(here / "f", on_file)
        mounts.bind(here, on_dir)
        try:
            reader = Reader(on_file)
            try:
                run("fd = os.open(p[0], os.O_WRONLY); os.pwrite(fd, b'BIND', 7)", on_dir / "f")
                seen = reader.observe(here / "f")
                run("fd = os.open(p[0], os.O_WRONLY); os.pwrite(fd, b'FILE', 4100)", on_file)
                seen |= {f"2: {key}": value for key, value in reader.observe(on_dir / "f").items()}
                run("os.rename(p[0], p[1])", here / "other", here / "other2")
                run("os.truncate(p[0], 4097)", on_file)
                seen |= {f"3: {key}": value for key, value in reader.observe(here / "f").items()}
                seen["bound, by name"] = on_file.read_bytes()
                return seen
            finally:
                reader.close()
        finally:
            mounts.umount(on_file)
            mounts.umount(on_dir)

    compare(places, scenario)


def test_reopened_for_writing(places: dict[str, Path]) -> None:
    """/proc/self/fd/N of a descriptor that was opened for reading, before and after it was unlinked."""

    def scenario(root: Path) -> dict[str, object]:
        here = root / "reopen" / "d"
        seen: dict[str, object] = {}
        for name in ("f", "mode", "linked"):
            reader = Reader(here / name)
            try:
                fd = os.open(f"/proc/self/fd/{reader.fd}", os.O_RDWR)
                os.pwrite(fd, b"REOPENED", 3)
                os.close(fd)
                seen[f"{name}: reopened"] = reader.observe(here / name)["read"]
                os.unlink(here / name)
                fd = os.open(f"/proc/self/fd/{reader.o_path}", os.O_RDWR)
                os.pwrite(fd, b"UNLINKED", 4096)
                os.ftruncate(fd, 5000)
                os.close(fd)
                for key, value in reader.observe(here / name).items():
                    seen[f"{name}: unlinked, {key}"] = value
            finally:
                reader.close()
        # A lower file that was never written to, unlinked while open, then opened for writing.
        fd = os.open(here / "big", os.O_RDONLY)
        os.unlink(here / "big")
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        os.pwrite(again, b"X", BIG - 1)
        seen["big"] = (os.pread(fd, 10, BIG - 10), os.pread(again, 20, 0), os.fstat(fd).st_nlink)
        os.close(fd)
        os.close(again)
        return seen

    compare(places, scenario)


def test_mapped_by_a_process_that_outlives_the_descriptor(places: dict[str, Path]) -> None:
    """Only mappings are left of the reader; then copy-up, unlink, and the pages not touched so far."""

    def scenario(root: Path) -> dict[str, object]:
        path = root / "late" / "d" / "f"
        fd = os.open(path, os.O_RDONLY)
        shared = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        private = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
        private[0:3] = b"own"
        run("fd = os.open(p[0], os.O_WRONLY); os.pwrite(fd, b'LATE', 4096 * 2)", path)
        seen: dict[str, object] = {"shared": shared[:], "private": private[4096 * 2 : 4096 * 2 + 4]}
        run("os.unlink(p[0])", path)
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
        seen["after unlink and drop_caches"] = shared[:]
        seen["private page"] = private[:3]
        shared.close()
        private.close()
        return seen

    compare(places, scenario)


# --- programs -------------------------------------------------------------------------------------


def test_running_program(root: None, make_stack: type[Stack]) -> None:
    """A lower binary that runs cannot be written (ETXTBSY); one that is open for writing cannot run."""
    stack, plain = make_stack(), make_stack()
    sleep = shutil.which("sleep")
    assert sleep
    for place in (stack.lowers[0], plain.mnt):
        for name in ("prog", "prog2", "prog3"):
            shutil.copy(sleep, place / name)
            os.utime(place / name, ns=(OLD_NS, OLD_NS))

    def scenario(root: Path) -> dict[str, object]:
        seen: dict[str, object] = {}
        process = subprocess.Popen([root / "prog", "60"])
        try:
            # It runs once its image is the program's.
            while os.readlink(f"/proc/{process.pid}/exe") != str(root / "prog"):
                pass
            seen["write"] = err(os.open, root / "prog", os.O_WRONLY)
            seen["O_TRUNC"] = err(os.open, root / "prog", os.O_RDWR | os.O_TRUNC)
            seen["truncate"] = err(os.truncate, root / "prog", 10)
            seen["chmod"] = err(os.chmod, root / "prog", 0o700)
            seen["write, after chmod"] = err(os.open, root / "prog", os.O_WRONLY)
            seen["link"] = err(os.link, root / "prog", root / "prog-link")
            seen["write the link"] = err(os.open, root / "prog-link", os.O_WRONLY)
            seen["rename over"] = err(os.rename, root / "prog3", root / "prog")
            seen["exe"] = os.readlink(f"/proc/{process.pid}/exe")
            seen["running"] = process.poll()
            seen["same program still"] = subprocess.run(
                [f"/proc/{process.pid}/exe", "0"], check=False
            ).returncode
        finally:
            process.kill()
            process.wait()
        seen["write the new one"] = err(lambda: os.close(os.open(root / "prog", os.O_WRONLY)))
        fd = os.open(root / "prog2", os.O_RDWR)
        seen["run, open for writing"] = err(subprocess.run, [root / "prog2", "0"])
        os.close(fd)
        seen["run, closed again"] = subprocess.run([root / "prog2", "0"], check=False).returncode
        fd = os.open(root / "prog2", os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"appended")
        os.close(fd)
        seen["run, copied up"] = subprocess.run([root / "prog2", "0"], check=False).returncode
        return {key: str(value).replace(str(root), "") for key, value in seen.items()}

    with lowers_guard(stack.lowers), mounts.Layerfs(stack) as m:
        compare({"plain": plain.mnt, "layerfs": m.mnt}, scenario)


def test_program_runs_on_while_it_is_copied_up(box: Box) -> None:
    """Pages of a running lower program that were never read before come after its copy-up and removal."""
    python = os.path.realpath(sys.executable)
    shutil.copy(python, box.lowers[0] / "python")
    box.layers_done()
    with box.layerfs() as m:
        code = (
            "import sys; print('started', flush=True); sys.stdin.readline();"
            "import json, ssl, decimal; print(6 * 7)"
        )
        home = {"PYTHONHOME": sys.base_prefix}
        process = subprocess.Popen(
            [m.mnt / "python", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | home,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            os.chmod(m.mnt / "python", 0o711)
            os.rename(m.mnt / "python", m.mnt / "python-moved")
            assert err(os.open, m.mnt / "python-moved", os.O_WRONLY) == "ETXTBSY"
            os.unlink(m.mnt / "python-moved")
            with open("/proc/sys/vm/drop_caches", "w") as file:
                file.write("3")
            out, _ = process.communicate("go\n", timeout=30)
            assert (process.returncode, out) == (0, "42\n")
        finally:
            process.kill()
            process.wait()


def test_read_only_opens_never_reach_the_lower_for_writing(box: Box) -> None:
    """The daemon holds lower files for reading only, whatever users do: seen in its own descriptors."""
    for name in "abc":
        (box.lowers[0] / name).write_bytes(DATA)
    box.layers_done()
    lower_device = os.stat(box.lowers[0]).st_dev
    lower_inodes = {os.stat(box.lowers[0] / name).st_ino for name in "abc"}
    with box.layerfs() as m:
        (pid,) = m.pids()
        fds = [
            os.open(m.mnt / "a", os.O_RDONLY),
            os.open(m.mnt / "b", os.O_RDWR),
            os.open(m.mnt / "c", os.O_RDONLY),
        ]
        os.chmod(m.mnt / "c", 0o600)
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                try:
                    status = os.stat(f"/proc/{pid}/fd/{number}")
                    with open(f"/proc/{pid}/fdinfo/{number}") as info:
                        flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags"))
                except FileNotFoundError:
                    continue
                if status.st_dev == lower_device and status.st_ino in lower_inodes:
                    assert flags & os.O_ACCMODE == os.O_RDONLY
        finally:
            for fd in fds:
                os.close(fd)


def test_sigbus_beyond_the_end(places: dict[str, Path]) -> None:
    """A page of a mapping beyond the new end kills its user with SIGBUS, as on a plain directory."""
    code = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "m = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)\n"
        "m[0]\nos.truncate(sys.argv[1], 10)\nprint(m[:10] == m[0:10], flush=True)\nm[8192]\n"
    )

    def scenario(root: Path) -> dict[str, object]:
        path = root / "late" / "d" / "mode"
        done = subprocess.run([sys.executable, "-S", "-c", code, path], capture_output=True, check=False)
        return {"out": done.stdout, "status": done.returncode}

    compare(places, scenario)
