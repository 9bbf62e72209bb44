"""Eight processes at once in the same directories of one mount, each with names of its own there, so that
each knows what must be under them: whatever it did, a second way says the same at once, while the kernel
forgets what it was told. No stale answer, present or absent, ever."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from tests.support.mounts import Layerfs
from tests.support.stack import Stack
from tests.support.tree import assert_equal, lowers_guard, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("root")]

WORKERS = 8
DIRECTORIES = ("a", "b", "b/c")
#: Of each worker in each directory; laid out in the layers, but for every third.
NAMES = 12
_HOLE = b"\0" * 300


@dataclass
class Object:
    """What must be under some of a worker's names."""

    mode: int
    content: bytes = b""
    target: str | None = None
    names: set[str] = field(default_factory=set)


class Worker:
    def __init__(self, top: str, number: int, seed: int) -> None:
        self.top, self.number = top, number
        self.choose = random.Random(seed)
        #: the second way to each directory, opened before anything was looked up
        self.ways = {d: os.open(f"{top}/{d}", os.O_PATH | os.O_DIRECTORY) for d in DIRECTORIES}
        self.model = laid_out(number)
        #: descriptors that were opened for reading long ago
        self.held: list[tuple[Object, int]] = []
        self.others = [other for other in range(WORKERS) if other != number]

    # -- names ------------------------------------------------------------------------------------

    def name(self, number: int | None = None) -> str:
        """Any of a worker's names, there or not."""
        worker = self.number if number is None else number
        return f"{self.choose.choice(DIRECTORIES)}/{worker}-{self.choose.randrange(NAMES)}"

    def present(self, kind: str = "any") -> str | None:
        paths = [
            path
            for path, found in self.model.items()
            if kind == "any" or (found.target is None) == (kind == "file")
        ]
        return self.choose.choice(sorted(paths)) if paths else None

    def first(self, path: str) -> str:
        return f"{self.top}/{path}"

    def second(self, path: str) -> str:
        directory, name = os.path.split(path)
        return f"/proc/self/fd/{self.ways[directory]}/{name}"

    def either(self, path: str) -> str:
        return self.choose.choice((self.first, self.second))(path)

    # -- what is done -----------------------------------------------------------------------------

    def run(self, seconds: float) -> int:
        ways = (
            self.create,
            self.create,
            self.unlink,
            self.rename,
            self.rename,
            self.link,
            self.symlink,
            self.chmod,
            self.truncate,
            self.append,
            self.append,
            self.hold,
            self.read_held,
            self.list_names,
            self.others_names,
            self.others_names,
            self.look,
            self.look,
        )
        end, done = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            self.choose.choice(ways)()
            done += 1
        for path in sorted(
            {*self.model, *(f"{d}/{self.number}-{n}" for d in DIRECTORIES for n in range(NAMES))}
        ):
            self.check(path)
        return done

    def create(self) -> None:
        path = self.name()
        if path in self.model:
            try:
                os.close(os.open(self.either(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return
            raise AssertionError(f"{path} was made a second time")
        content = self.choose.randbytes(self.choose.randrange(3000))
        fd = os.open(self.either(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640)
        os.write(fd, content)
        os.close(fd)
        self.model[path] = Object(0o640, content, names={path})
        self.check(path)

    def symlink(self) -> None:
        path = self.name()
        if path not in self.model:
            target = f"somewhere-{self.choose.random()}"
            os.symlink(target, self.either(path))
            self.model[path] = Object(0o777, target=target, names={path})
            self.check(path)

    def unlink(self) -> None:
        if path := self.present():
            os.unlink(self.either(path))
            self._gone(path)
            self.check(path)

    def _gone(self, path: str) -> None:
        self.model.pop(path).names.discard(path)

    def rename(self) -> None:
        old, new = self.present(), self.name()
        if old is None or (new in self.model and self.model[new] is self.model[old]):
            return  # rename(2) does nothing between two names of one file
        os.rename(self.either(old), self.either(new))
        if new in self.model:
            self._gone(new)
        moved = self.model[old]
        self._gone(old)
        self.model[new] = moved
        moved.names.add(new)
        self.check(old)
        self.check(new)

    def link(self) -> None:
        old, new = self.present(), self.name()
        if old is not None and new not in self.model:
            os.link(self.either(old), self.either(new), follow_symlinks=False)
            self.model[new] = self.model[old]
            self.model[new].names.add(new)
            self.check(old)
            self.check(new)

    def chmod(self) -> None:
        if path := self.present("file"):
            mode = self.choose.choice((0o600, 0o644, 0o755))
            os.chmod(self.either(path), mode)
            self.model[path].mode = mode
            self.check(path)

    def truncate(self) -> None:
        if path := self.present("file"):
            size = self.choose.choice((0, 1, 100, len(self.model[path].content) + len(_HOLE)))
            os.truncate(self.either(path), size)
            self.model[path].content = (self.model[path].content + _HOLE)[:size].ljust(size, b"\0")
            self.check(path)

    def append(self) -> None:
        if path := self.present("file"):
            text = self.choose.randbytes(self.choose.randrange(1, 200))
            with open(self.either(path), "ab", buffering=0) as file:
                file.write(text)
            self.model[path].content += text
            self.check(path)

    def hold(self) -> None:
        if path := self.present("file"):
            if len(self.held) > 20:
                os.close(self.held.pop(self.choose.randrange(len(self.held)))[1])
            self.held.append((self.model[path], os.open(self.either(path), os.O_RDONLY)))

    def read_held(self) -> None:
        """Also when it was copied up, renamed or unlinked since."""
        if self.held:
            held, fd = self.choose.choice(self.held)
            assert os.pread(fd, 1 << 20, 0) == held.content, f"a descriptor of {held.names}"
            st = os.fstat(fd)
            assert (stat.S_IMODE(st.st_mode), st.st_nlink) == (held.mode, len(held.names)), f"{held.names}"

    def list_names(self) -> None:
        directory = self.choose.choice(DIRECTORIES)
        mine = {path for path in self.model if os.path.dirname(path) == directory}
        listed = os.listdir(
            self.choose.choice((f"{self.top}/{directory}", f"/proc/self/fd/{self.ways[directory]}"))
        )
        found = [f"{directory}/{name}" for name in listed if name.startswith(f"{self.number}-")]
        assert sorted(found) == sorted(mine), f"{directory}: {sorted(mine.symmetric_difference(found))}"

    def others_names(self) -> None:
        """Whatever is there; it makes the kernel know names that others change."""
        path = self.either(self.name(self.choose.choice(self.others)))
        try:
            if stat.S_ISREG(os.lstat(path).st_mode):
                with open(path, "rb") as file:
                    file.read()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ESTALE):
                raise

    def look(self) -> None:
        self.check(self.name())

    # -- what must be so --------------------------------------------------------------------------

    def check(self, path: str) -> None:
        for way in self.choose.sample((self.first(path), self.second(path)), 2):
            wanted = self.model.get(path)
            try:
                st = os.lstat(way)
            except FileNotFoundError:
                assert wanted is None, f"{way} is absent, {path} should be there"
                continue
            assert wanted is not None, f"{way} is there, {path} should be absent"
            assert st.st_nlink == len(wanted.names), f"{way}: {st.st_nlink} links, not {wanted.names}"
            if wanted.target is not None:
                assert os.readlink(way) == wanted.target, way
                continue
            assert stat.S_IMODE(st.st_mode) == wanted.mode, f"{way}: mode {st.st_mode:o}, not {wanted.mode:o}"
            assert st.st_size == len(wanted.content), f"{way}: {st.st_size} bytes, not {len(wanted.content)}"
            with open(way, "rb") as file:
                assert file.read() == wanted.content, f"{way}: content"

    def told(self) -> dict[str, list[object]]:
        """The model, for whoever started this process."""
        return {path: [o.mode, o.content.hex(), o.target, sorted(o.names)] for path, o in self.model.items()}


def laid_out(number: int) -> dict[str, Object]:
    """What a worker finds: in the layers two of three of its names: a link, a file with two names, files."""
    found: dict[str, Object] = {}
    for directory in DIRECTORIES:
        for index in range(NAMES):
            path = f"{directory}/{number}-{index}"
            if index % 3 == 2:
                continue
            if index == 9:
                found[path] = Object(0o777, target=f"to-{path}", names={path})
            elif index == 10:
                found[path] = found[f"{directory}/{number}-7"]
                found[path].names.add(path)
            else:
                found[path] = Object(0o644, f"{path} in a layer ".encode() * (index * 20 + 1), names={path})
    return found


def _lay_out(stack: Stack) -> None:
    """Each object in one of the layers, the upper among them."""
    assert stack.upper is not None
    layers = [stack.upper, *stack.lowers]
    for layer in layers:
        for directory in DIRECTORIES:
            (layer / directory).mkdir()
    for number in range(WORKERS):
        for path, made in laid_out(number).items():
            layer = layers[int(path.rpartition("-")[2]) % len(layers)]
            if path.endswith("-10"):  # where its other name is
                layer = layers[7 % len(layers)]
                os.link(layer / path.replace("-10", "-7"), layer / path)
            elif made.target is not None:
                (layer / path).symlink_to(made.target)
            else:
                (layer / path).write_bytes(made.content)
                (layer / path).chmod(made.mode)


def stress(stack: Stack, seconds: int, options: str) -> None:
    _lay_out(stack)
    with lowers_guard(stack.lowers), Layerfs(stack, options) as mount:
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(mount.mnt), str(number), str(number + 1), str(seconds)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(WORKERS)
        ]
        dropper = subprocess.Popen(
            ["sh", "-c", "while sleep 0.03; do echo 2 > /proc/sys/vm/drop_caches; done"],
        )
        try:
            told = [worker.communicate()[0] for worker in workers]
        finally:
            dropper.kill()
            dropper.wait()
        assert [worker.returncode for worker in workers] == [0] * WORKERS
        live = snapshot(mount.mnt)
        for said in told:
            model = json.loads(said.splitlines()[-1])
            print(said.splitlines()[0])
            for path, (mode, content, target, names) in model.items():
                found = live.pop(path.encode())
                assert {os.fsdecode(name) for name in found.names} == set(names)
                if target is not None:
                    assert (found.type, found.target) == ("symlink", target.encode())
                else:
                    assert (found.type, found.mode, found.size) == ("file", mode, len(content) // 2)
        assert {name for name in live if live[name].type != "dir"} == set(), "names that nobody made"
        live = snapshot(mount.mnt)
        mount.remount()
        assert_equal(live, snapshot(mount.mnt))


@pytest.mark.parametrize(
    ("options", "seconds"),
    [("", 10), ("max_names=20", 10), ("gate=off", 3)],
    ids=["gate", "few names", "no gate"],
)
def test_no_stale_answer(make_stack: type[Stack], options: str, seconds: int) -> None:
    """With few names directories are dropped and loaded again all the time."""
    stress(make_stack(n_lowers=2), seconds, options)


@pytest.mark.long
def test_no_stale_answer_for_a_minute(make_stack: type[Stack]) -> None:
    stress(make_stack(n_lowers=2), 60, "")


def main(top: str, number: int, seed: int, seconds: float) -> None:
    worker = Worker(top, number, seed)
    print(f"worker {number}: {worker.run(seconds)} operations")
    print(json.dumps(worker.told()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
